"""A run with saves, evaluations and kills at random, beside one that nothing disturbs: `python -m tests.soak`.

Memory, open files and threads must not grow, and the last states and all losses must be equal, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import CheckpointConfig
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runs.metrics_file import read_metrics
from mixtral_jax.runs.streaming import read_blocks
from tests.small_run import ROOT, environment, write_config

FEWEST = 60  # samples of a process from which growth is told
TOLERANCE = 1.03  # of memory, and of threads: one of 40, for pools of libraries fill up late; files may not grow at all


class Sample(NamedTuple):
    step: int
    memory: float  # resident, MB
    files: int
    threads: int


def last_step(run: Path) -> int:
    """Of the end of the log, whose last line may be half-written."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - 10_000))
        whole = log.read().split(b"\n")[:-1]
    return json.loads(whole[-1])["step"] if whole else 0


def sample(process: int, run: Path) -> Sample | None:
    """What a process holds; None where it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{process}/fd"))
        return Sample(last_step(run), int(status["VmRSS"].split()[0]) / 1000, files, int(status["Threads"]))
    except (OSError, KeyError):
        return None


def train(config: Path, run: Path, keys: list[str], kill_at: int | None) -> list[Sample]:
    """Trains until the end, or until a step is in the log, where the process is killed."""
    samples = list[Sample]()
    command = [sys.executable, str(ROOT / "train.py"), str(config), f"run_dir={run}", *keys]
    with open(run.with_suffix(".out"), "ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment(XLA_FLAGS=""))
        while process.poll() is None:
            if (found := sample(process.pid, run)) is not None and (not samples or found.step > samples[-1].step):
                samples.append(found)
                if kill_at is not None and found.step >= kill_at:
                    process.kill()
            time.sleep(0.1)
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), f"see {out.name}"
    return samples


def grown(samples: list[Sample]) -> list[str]:
    """What is more in the last third of a process than in the middle one, beyond what is allowed."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    found = []
    # A save has files and threads while it goes on; what is left behind shows where there is none.
    for name, factor, usual in (
        ("memory", TOLERANCE, statistics.median),
        ("files", 1, min),
        ("threads", TOLERANCE, min),
    ):
        before, after = (usual(getattr(one, name) for one in part) for part in (middle, last))
        if after > before * factor:
            found.append(f"{name}: {before:g} to {after:g}")
    return found


def content(run: Path, step: int) -> dict[str, bytes]:
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig())
    assert checkpoints.latest() == step
    parts = checkpoints.read_meta(step)["arrays"]
    return {
        f"{part}/{name}": b"".join(
            np.asarray(block).tobytes() for block in read_blocks(run / "checkpoints" / str(step) / "state" / part, name)
        )
        for part, arrays in parts.items()
        for name in arrays
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"logs and checkpoints: {folder}", flush=True)
    config = write_config(folder)
    keys = [f"train.steps={asked.steps}", "train.eval_every=100", "train.eval_batches=1", "checkpoint.every=50"]
    kills = sorted(random.Random(asked.seed).sample(range(1, asked.steps), asked.kills))
    began, trouble = time.monotonic(), list[str]()
    for name, ends in (("undisturbed", [None]), ("killed", [*kills, None])):
        for end in ends:
            samples = train(config, folder / name, keys, end)
            first, last = samples[0], samples[-1]
            if len(samples) >= FEWEST:
                trouble += [f"{name} to step {last.step}: {text}" for text in grown(samples)]
                first = samples[len(samples) // 3]
            seconds, more = time.monotonic() - began, zip(Sample._fields, first, last, strict=True)
            print(f"{seconds:5.0f} s {name}: " + ", ".join(f"{what} {a:g} to {b:g}" for what, a, b in more), flush=True)
    runs = [folder / "undisturbed", folder / "killed"]
    states = [content(run, asked.steps) for run in runs]
    logs = [[line for line in read_metrics(run / "metrics.jsonl") if "loss" in line] for run in runs]
    losses = [{line["step"]: line["loss"] for line in log} for log in logs]
    if states[0] != states[1]:
        trouble.append(f"other states: {[name for name in states[0] if states[0][name] != states[1].get(name)]}")
    if losses[0] != losses[1] or len(losses[0]) != asked.steps:
        trouble.append(f"other losses, or {len(losses[0])} and {len(losses[1])} of them")
    print("\n".join(trouble) or f"{len(states[0])} arrays and {len(losses[0])} losses are equal; nothing grew")
    return bool(trouble)


if __name__ == "__main__":
    sys.exit(main())
