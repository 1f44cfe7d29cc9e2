"""Saving, verifying and restoring a training state, against plainly writing and reading as many bytes.

python -m benchmarks.checkpoint [--config configs/small.yaml] [--directory /scratch] [--rounds 3]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Report
from mixtral_jax.config import CheckpointConfig
from mixtral_jax.config_loading import load_config
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runtime import make_runtime
from mixtral_jax.training.step import Trainable

CONFIG = Path(__file__).parent.parent / "configs" / "small.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's temporary directory")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    config = load_config(options.config)
    trainable = Trainable(Architecture(config.model, make_runtime(config)), config)
    state = jax.block_until_ready(noise(trainable.start(trainable.architecture.init(0))))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        jax.block_until_ready(work())
        seconds.setdefault(name, []).append(time.perf_counter() - begin)

    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        plain = Path(folder) / "plain"
        blob = os.urandom(1 << 24)
        for number in range(options.rounds):
            timed("write plainly, synced", lambda: write(plain, blob, size))
            timed("read plainly", lambda: read(plain))
            plain.unlink()
            with Checkpoints(Path(folder) / "checkpoints", CheckpointConfig(keep=1)) as checkpoints:
                timed("save, until training goes on", lambda n=number: checkpoints.save(n + 1, state, {}, {}))
                timed("save, the rest in the background", checkpoints.wait)
                timed("verify all checksums", lambda n=number: checkpoints.find_damage(n + 1))
                timed("restore", lambda n=number: checkpoints.restore(n + 1, trainable.abstract()))
    report = Report(
        f"checkpoint of {options.config.name}, {size / 2**30:.2f} GiB", "MB/s = bytes of the state / median seconds"
    )
    for name, taken in seconds.items():
        median = statistics.median(taken)
        report.add(work=name, seconds=median, MB_a_second=size / median / 1e6)
    report.show()


@partial(jax.jit, donate_argnums=0)
def noise(state: Any) -> Any:
    """Fills a state with random numbers, as training does; the moments of a new one are zeros, which compress."""
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    filled = [
        jax.random.normal(key, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, filled)


def read(path: Path) -> None:
    """Reads a file into one small buffer."""
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def write(path: Path, blob: bytes, size: int) -> None:
    """Writes so many bytes and waits for the disk."""
    with path.open("wb") as file:
        for _ in range(size // len(blob) + 1):
            file.write(blob)
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
