"""A process that runs alone ends when a step hangs, not before it trains, after it, or when it was held still."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import train
from mixtral_jax import cli
from mixtral_jax.data.pipeline import TrainingData
from mixtral_jax.distributed.step_watch import StepWatch
from tests.processes import PATIENCE, fork, on_devices, without_noise
from tests.small_run import write_config

pytestmark = pytest.mark.drills
TIMEOUT = 2.0  # seconds


def live(out: Path, way: str) -> None:
    """Runs for twice the timeout."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 2)
    watch = StepWatch(TIMEOUT, "start again")
    watch.start()
    if way in ("hang", "done"):
        watch.progress()
    if way == "done":
        watch.stop_waiting()
    for _ in range(20):
        time.sleep(TIMEOUT / 10)
        if way == "work":
            watch.progress()
    watch.stop()


@pytest.mark.parametrize(("way", "code"), [("nothing yet", 0), ("work", 0), ("done", 0), ("hang", 75)])
def test_only_steps_are_waited_for(tmp_path: Path, way: str, code: int) -> None:
    process = fork(live, tmp_path / "err", way)
    process.join(PATIENCE)
    assert process.exitcode == code
    said = (tmp_path / "err").read_text()
    assert said.startswith("error: no step was finished in 2 seconds (distributed.step_timeout); ") == bool(code)
    assert said.endswith("then start again\n") == bool(code)


def work_a_little(started: Path) -> None:
    watch = StepWatch(TIMEOUT, "start again")
    watch.start()
    watch.progress()
    started.touch()
    time.sleep(TIMEOUT / 4)
    watch.stop()


def test_a_process_that_was_held_still_is_not_late(tmp_path: Path) -> None:
    process = fork(work_a_little, tmp_path / "started")
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    os.kill(process.pid, signal.SIGCONT)
    process.join(PATIENCE)
    assert process.exitcode == 0


def train_until_a_batch_never_comes(directory: Path, config: Path) -> None:
    os.dup2(os.open(directory / "err", os.O_WRONLY | os.O_CREAT), 2)
    batch = TrainingData.batch

    def hang(self: TrainingData, number: int, *rows: Any) -> Any:
        if number == 5:
            threading.Event().wait()
        return batch(self, number, *rows)

    setattr(TrainingData, "batch", hang)  # noqa: B010
    sys.argv = ["train.py", str(config), "distributed.step_timeout=20"]
    cli.run(train.main, several=True)


@pytest.mark.slow
def test_a_run_that_hangs_ends_with_one_sentence(tmp_path: Path) -> None:
    process = fork(train_until_a_batch_never_comes, tmp_path, write_config(tmp_path), **on_devices())
    process.join(PATIENCE)
    said = without_noise((tmp_path / "err").read_text())
    assert process.exitcode == 75, said
    last = said.splitlines()[-1]
    assert last.startswith("error: no step was finished in 20 seconds"), said
    assert last.endswith("start the same command again: it goes on from the newest checkpoint")
    assert (tmp_path / "run" / "checkpoints" / "4" / "manifest.json").exists()
