"""Scores tokens with this package and with transformers: the same weights, the same machine, one run, medians.

    python -m benchmarks.eval_forward                          # configs/small.yaml, 214M parameters
    python -m benchmarks.eval_forward --repeats 3 --json out.json model.num_layers=2

Needs this package installed (`pip install -e .`) and requirements-parity.txt. Both get the log-likelihood of every next
token of the same texts; compilation is not counted. Two kinds of work: full rows, as for perplexity, and short texts of
many lengths, as tasks have them: there, this package packs rows and transformers gets batches sorted by length and
padded.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from rich.table import Table

from mixtral_jax.config_loading import load_config
from mixtral_jax.console import make_console
from mixtral_jax.evaluation.requests import Request, row_lengths, score_requests
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.evaluation.windows import empty_batch
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.weights.exporting import About, export_weights

CONFIG = Path(__file__).parents[1] / "configs" / "small.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--texts", type=int, default=64, help="short texts, 16 to 160 tokens (64)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement, taken in turns (5)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as model.num_layers=2")
    options = parser.parse_intermixed_args()

    config = load_config(CONFIG, options.overrides)
    runtime = make_runtime(config)
    architecture = Architecture(config.model, runtime)
    arrays = architecture.init(0)
    score = make_scorer(architecture)(arrays)
    rng = np.random.default_rng(0)
    vocab = config.model.vocab_size
    rows = rng.integers(3, vocab, (options.rows, options.length + 1))
    texts = [rng.integers(3, vocab, size + 1).tolist() for size in rng.integers(16, 161, options.texts)]
    batch_tokens = options.rows * options.length

    with tempfile.TemporaryDirectory() as name:
        export_weights(arrays, config.model, Path(name) / "hf", "hf", About(options.length, load_balance=0.0))
        oracle = transformers.AutoModelForCausalLM.from_pretrained(Path(name) / "hf", dtype=torch.float32).eval()

    def ours_rows() -> np.ndarray:
        batch = empty_batch(*rows[:, 1:].shape)
        batch.tokens[:], batch.targets[:] = rows[:, :-1], rows[:, 1:]
        batch.segment_ids[:], batch.positions[:] = 1, np.arange(options.length)
        batch.loss_mask[:] = True
        return score(batch).nats.sum(axis=1)

    def ours_texts() -> np.ndarray:
        requests = [Request(text, 1) for text in texts]
        answers = score_requests(score, requests, row_lengths(options.length), batch_tokens)
        return np.array([answer.nats for answer in answers])

    def nats(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits = oracle(tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (losses.view(len(tokens), -1) * mask[:, 1:]).sum(dim=1)

    def theirs_rows() -> np.ndarray:
        tokens = torch.from_numpy(rows)
        return nats(tokens, torch.ones_like(tokens)).numpy()

    def theirs_texts() -> np.ndarray:
        out = np.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        while order:
            members = order[: max(1, batch_tokens // len(texts[order[0]]))]
            order = order[len(members) :]
            width = len(texts[members[0]])
            tokens = torch.tensor([texts[index] + [0] * (width - len(texts[index])) for index in members])
            mask = torch.tensor([[1] * len(texts[i]) + [0] * (width - len(texts[i])) for i in members])
            out[members] = nats(tokens, mask).numpy()
        return out

    results = {
        "full rows": measure({"ours": ours_rows, "transformers": theirs_rows}, batch_tokens, options.repeats),
        "short texts": measure(
            {"ours": ours_texts, "transformers": theirs_texts}, sum(len(text) - 1 for text in texts), options.repeats
        ),
    }
    facts = {
        "device": runtime.describe(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": options.rows,
        "length": options.length,
        "texts": options.texts,
        "repeats": options.repeats,
        "model": {key: getattr(config.model, key) for key in ("d_model", "d_ff", "num_layers", "num_experts")},
    }
    table = Table(title=f"tokens/s, medians of {options.repeats}", caption=facts["device"])
    for column in (
        "",
        "this package",
        f"transformers {transformers.__version__}",
        "ratio",
        "largest difference, nats/token",
    ):
        table.add_column(column, justify="right" if column else "left")
    for work, found in results.items():
        ours, theirs = found["ours"], found["transformers"]
        table.add_row(work, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}", f"{found['difference']:.1e}")
    make_console().print(table)
    if options.json:
        options.json.write_text(json.dumps({**facts, "tokens_per_second": results}, indent=2) + "\n")


def measure(calls: dict[str, Callable[[], Any]], tokens: int, repeats: int) -> dict[str, float]:
    """Runs all in turns, after once unmeasured; returns tokens/s of each, and how far their results lie apart."""
    answers = [call() for call in calls.values()]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    return {**rates, "difference": float(np.abs(answers[0] - answers[1]).sum() / tokens)}


if __name__ == "__main__":
    main()
