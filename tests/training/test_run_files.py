"""Files of a run's directory that are lost, foreign or of a process that was killed, and its lock as NFS keeps it."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.config_loading import load_config
from mixtral_jax.training.trainer import Trainer
from tests.small_run import write_config
from tests.training.test_runs import losses, parameters

pytestmark = pytest.mark.drills
STEPS, FIRST = 6, 3
KEYS = ("train.batch_size=8", "mesh.fsdp=8", f"train.steps={STEPS}", "train.eval_every=3", "checkpoint.every=2")


def train(directory: Path, *more: str) -> Path:
    run = directory / "run"
    Trainer(load_config(directory.parent / "config.yaml", [*KEYS, *more, f"run_dir={run}"]), say=str).run()
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run that nothing disturbed, and one that was stopped half way."""
    place = tmp_path_factory.mktemp("place")
    write_config(place)
    train(place / "undisturbed")
    train(place / "stopped", f"train.stop_at_step={FIRST}")
    return place


def leave_foreign(run: Path) -> None:
    for name in ("notes.txt", "checkpoints/notes.txt", "checkpoints/5/state/array", ".nfs0001", "lock"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")


def leave_half(run: Path) -> None:
    for name in ("metrics.jsonl", "goodput.json", "config.yaml", f"checkpoints/{FIRST}/manifest.json"):
        whole = (run / name).read_bytes()
        (run / f"{name}.partial").write_bytes(whole[: len(whole) // 2])


CHANGES: dict[str, Callable[[Path], object]] = {
    "no log": lambda run: (run / "metrics.jsonl").unlink(),
    "no account of time": lambda run: (run / "goodput.json").unlink(),
    "no curves": lambda run: shutil.rmtree(run / "tensorboard"),
    "foreign files": leave_foreign,
    "files of a killed writer": leave_half,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_whatever_lies_beside_its_checkpoints(place: Path, change: str) -> None:
    shutil.copytree(place / "stopped", place / change)
    CHANGES[change](place / change / "run")
    run, undisturbed = train(place / change), place / "undisturbed" / "run"
    assert parameters(run, STEPS) == parameters(undisturbed, STEPS)
    assert losses(run) == losses(undisturbed)[FIRST * (change == "no log") :]
    if change == "foreign files":
        assert (run / "notes.txt").read_text() == "mine"
    else:
        assert not list(run.glob("*.partial"))


def test_a_run_without_its_configuration_is_one_sentence(place: Path) -> None:
    shutil.copytree(place / "stopped", place / "no configuration")
    (place / "no configuration" / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"run_dir .* holds .* and no run: name a new or empty directory"):
        train(place / "no configuration")


def test_the_lock_holds_where_it_is_one_of_the_whole_process_as_on_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS makes POSIX locks of flock's: whoever closes any handle of the file lets go, and needs one to write with."""
    write_config(tmp_path)
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    told, log, lock = list[str](), Trainer._report, tmp_path / "one" / "run" / "lock"
    take = f"import fcntl; fcntl.lockf(open({str(lock)!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def report(trainer: Trainer, *facts: object) -> None:
        log(trainer, *facts)
        second = subprocess.run([sys.executable, "-c", take], capture_output=True, text=True, check=False)
        told.append(second.stderr.splitlines()[-1])

    monkeypatch.setattr(Trainer, "_report", report)
    train(tmp_path / "one")
    assert len(told) == STEPS
    assert all(text.startswith("BlockingIOError") for text in told), told
    assert not lock.exists()
