"""Tokens a second that the loader gives from a warm cache: mixing, shuffling, packing, segment ids, positions, masks.

    python -m benchmarks.data_loader [--rows 8x512 64x512 16x2048] [--million-tokens 4]

Text is made of random words, in two sources of different weight. The loader must never be what a step waits for:
`in_turn` is what a step would wait for its batch if it were made and placed on the device when it is needed, `ahead`
what it does wait.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.measure import Report
from mixtral_jax.config import MeshConfig
from mixtral_jax.config_loading import parse_config
from mixtral_jax.data.batch import put_batch
from mixtral_jax.data.pipeline import TrainingData, open_documents
from mixtral_jax.data.prefetch import prefetch
from mixtral_jax.sharding import make_mesh, named_sharding

MODEL = (
    "model: {d_model: 8, d_ff: 8, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 4, vocab_size: 32000, "
    "num_experts: 2, num_experts_per_tok: 1, rope_theta: 1e4, norm_eps: 1e-5}\n"
)
SECONDS = 3.0  # of each measurement
STEP = 0.02  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["8x512", "64x512", "16x2048"], help="rows x tokens of a batch")
    parser.add_argument("--million-tokens", type=float, default=4.0, help="about so many in each source")
    options = parser.parse_args()

    report = Report(
        "data loader, two sources of weights 2 and 1",
        "tokens/s = positions of the batches / seconds; ms = median milliseconds that a step waits for its batch",
    )
    sharding = named_sharding(make_mesh(MeshConfig(), jax.devices()[:1]), ("batch", "sequence"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [
            {"name": name, "path": str(write_text(folder / f"{name}.jsonl", options.million_tokens)), "weight": weight}
            for name, weight in (("first", 2), ("second", 1))
        ]
        for batch in options.rows:
            rows, seq_len = (int(part) for part in batch.split("x"))
            data = {"seq_len": seq_len, "tokenizer": "mixtral", "cache_dir": str(folder / "cache"), "sources": sources}
            config = parse_config(f"{MODEL}data: {json.dumps(data)}\ntrain: {{steps: 1, batch_size: {rows}}}")
            training = TrainingData(config, open_documents(config)[1])
            alone = rate(rows * seq_len, map(training.batch, itertools.count()))
            with prefetch(training.batch, 0, 1 << 30) as batches:
                ahead = rate(rows * seq_len, iter(batches))

            def place(step: int, training=training) -> dict:
                return put_batch(training.batch(step), sharding)

            with prefetch(place, 0, 1 << 30) as batches:
                waits = stall(iter(batches))
            report.add(
                batch=batch, tokens_a_second=alone, prefetched=ahead,
                in_turn_ms=stall(map(place, itertools.count())), ahead_ms=waits,
            )  # fmt: skip
    report.show()


def write_text(path: Path, million_tokens: float) -> Path:
    """Writes documents of 20 to 2,000 words that no two share."""
    draw = random.Random(path.name)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(5000)]
    left = int(million_tokens * 1e6 / 3)  # random words take some three tokens
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            size = min(left, int(20 * 100 ** draw.random()))
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=size))}) + "\n")
            left -= size
    return path


def rate(tokens: int, batches) -> float:
    """Takes batches of so many tokens for some seconds, the first one uncounted."""
    next(batches)
    taken, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        next(batches)
        taken += tokens
    return taken / (time.perf_counter() - begin)


def stall(batches) -> float:
    """Median milliseconds that a loop waits for a batch on the device when its steps take `STEP` seconds."""
    waited = []
    for _ in range(50):
        begin = time.perf_counter()
        jax.block_until_ready(next(batches))
        waited.append(1e3 * (time.perf_counter() - begin))
        time.sleep(STEP)  # as the device would be busy and the host not
    return statistics.median(waited)


if __name__ == "__main__":
    main()
