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
PARTS = 6  # of the curve that is shown
TOLERANCE = 1.03  # of memory; files may not grow at all
SPARE = 2  # threads of Python's own pools that come and go; one left behind by each save is twenty in 1,000 steps


class Sample(NamedTuple):
    step: int
    memory: float  # resident, MB
    files: int
    threads: int  # of Python, and of what does not name its threads; pools of libraries fill up late and do name them


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
        threads = [file.read_text() for file in Path(f"/proc/{process}/task").glob("*/comm")]
        unnamed = threads.count(status["Name"].strip() + "\n")
        return Sample(last_step(run), int(status["VmRSS"].split()[0]) / 1000, files, unnamed)
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


def curve(samples: list[Sample], parts: int) -> list[Sample]:
    """What a process held in each part of its samples, with the last step of it."""
    size = len(samples) // parts
    found = []
    for part in (samples[number * size : (number + 1) * size] for number in range(parts)):
        memory = statistics.median(one.memory for one in part)
        # A save has files and threads while it goes on; what is left behind shows where there is none.
        found.append(Sample(part[-1].step, memory, min(one.files for one in part), min(one.threads for one in part)))
    return found


def grown(samples: list[Sample]) -> list[str]:
    """What is more in the last third of a process than in the middle one, beyond what is allowed."""
    _, before, after = curve(samples, 3)
    allowed = Sample(after.step, before.memory * TOLERANCE, before.files, before.threads + SPARE)
    return [
        f"{name}: {had:g} to {has:g}"
        for name, had, has, most in zip(Sample._fields, before, after, allowed, strict=True)
        if has > most
    ]


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
            print(
                f"{time.monotonic() - began:5.0f} s {name}, killed at {end}" if end else f"{name} to the end",
                flush=True,
            )
            if len(samples) >= FEWEST:
                trouble += [f"{name} to step {samples[-1].step}: {text}" for text in grown(samples)]
                for part in curve(samples, PARTS):
                    print("        to step {:5d}: {:.0f} MB, {} files, {} threads".format(*part), flush=True)
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
