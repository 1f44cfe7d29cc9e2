"""Measures perplexity: `python eval.py RUN_OR_CHECKPOINT [--json FILE] [key=value ...]`."""

import argparse
from pathlib import Path

from rich.console import Console

from mixtral_jax import cli
from mixtral_jax.distributed import distributed_config, is_main, joined, main_first


def main(arguments: list[str]) -> None:
    """Prints a table of perplexity by source and, if asked, writes it as JSON."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run directory or one of its checkpoints")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to this file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="such as eval.mode=strided or data.sources=[{name: x, path: y}]",
    )
    options = parser.parse_intermixed_args(arguments)
    with joined(distributed_config(options.overrides)):
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Does what the command line asks for, in one process or together with others."""
    from mixtral_jax.evaluation.loading import evaluation_texts, load_model
    from mixtral_jax.evaluation.report import measure_with_progress, results_json, results_table, write_json
    from mixtral_jax.evaluation.scoring import make_scorer

    console = Console()
    loaded = load_model(options.checkpoint, options.overrides)
    console.print(loaded.architecture.runtime.describe(), highlight=False)
    texts = main_first(lambda: evaluation_texts(loaded))
    score = make_scorer(loaded.architecture)(loaded.arrays)
    evaluation = measure_with_progress(score, texts, loaded.config.eval, loaded.config.data.seq_len)
    console.print(results_table(evaluation))
    if options.json and is_main():
        numbers = results_json(evaluation, tokenizer=loaded.tokenizer.fingerprint, checkpoint_step=loaded.step)
        write_json(options.json, numbers)


if __name__ == "__main__":
    cli.run(main, several=True)
