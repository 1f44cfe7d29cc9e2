"""Measures a model: `python eval.py RUN_OR_CHECKPOINT [MODE] [--json FILE] [--plots DIR] [key=value ...]`."""

import argparse
from pathlib import Path

from mixtral_jax import cli
from mixtral_jax.config import UserError
from mixtral_jax.config_loading import home_expanded, user_path
from mixtral_jax.console import make_console
from mixtral_jax.distributed.cluster import distributed_config
from mixtral_jax.distributed.processes import joined
from mixtral_jax.evaluation.outputs import check_outputs

MODES = ("perplexity", "context", "passkey", "routing", "ablation", "saturation", "tasks")


def main(arguments: list[str]) -> None:
    """Prints tables of what was measured and, if asked, writes the numbers as JSON and the pictures."""
    parser = cli.Arguments(prog="python eval.py", description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", type=home_expanded, help="a run directory or one of its checkpoints"
    )
    parser.add_argument("--json", metavar="FILE", type=user_path, help="also write the numbers to this file")
    parser.add_argument("--plots", metavar="DIR", type=user_path, help="also draw pictures into this directory")
    parser.add_argument(
        "--tasks", metavar="TASK", nargs="+", default=[], help="JSONL or YAML files, or lm-eval's names"
    )
    parser.add_argument("rest", metavar="MODE | key=value", nargs="*", help=f"one of {', '.join(MODES)} (perplexity); "
                        "overrides such as eval.mode=strided or data.sources=[{name: x, path: y}]")  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    tasks = [word for word in options.tasks if "=" not in word]
    overrides = [word for word in (*options.rest, *options.tasks) if "=" in word]
    named = [word for word in options.rest if "=" not in word] or ["tasks" if tasks else "perplexity"]
    for word in named:
        if word not in MODES:
            raise UserError(f"'{word}' is neither a mode ({', '.join(MODES)}) nor key=value")
    if len(named) > 1 or (tasks and named != ["tasks"]):
        raise UserError(f"one mode at a time: {', '.join([*named, *['tasks'] * bool(tasks)])}")
    if named == ["tasks"] and not tasks:
        raise UserError("the mode tasks needs --tasks with one or more files or names of tasks")
    check_outputs(options.json, options.plots)
    cli.check_checkpoint(Path(options.checkpoint))
    distributed = distributed_config(overrides)
    cli.prepare(distributed, cli.cache_dir_of(overrides))
    with joined(distributed):
        measure(options, named[0], tasks, overrides)


def measure(options: argparse.Namespace, mode: str, tasks: list[str], overrides: list[str]) -> None:
    """Does what the command line asks for, in one process or together with others."""
    from mixtral_jax.evaluation import modes
    from mixtral_jax.evaluation.loading import load_model

    console = make_console()
    loaded = load_model(options.checkpoint, overrides, packed=mode not in ("context", "passkey", "tasks"))
    console.print(loaded.architecture.runtime.describe())
    report = modes.tasks(loaded, tasks) if tasks else modes.MODES[mode](loaded)
    modes.show(report, console, options.json, options.plots)


if __name__ == "__main__":
    cli.run(main, several=True)
