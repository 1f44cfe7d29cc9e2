"""Renames that are replayed and files in use that stay, as on NFS: a run, an import and an export as without."""

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.config_loading import load_config
from mixtral_jax.data.cache_files import building, locked
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runs.run_dir import RunDirectory
from mixtral_jax.training.trainer import Trainer
from mixtral_jax.verbs import VERBS
from mixtral_jax.weights.destination import new_directory, new_file
from mixtral_jax.whole_files import make_place, move, write_whole
from tests.nfs import keep_files_in_use, replay_renames
from tests.runs.test_drills import assert_good, save
from tests.small_run import write_config
from tests.tiny import tiny_config
from tests.training.test_runs import losses, parameters
from tests.weights.models import small
from tests.weights.synthetic import classic, write
from tests.weights.test_bad_sources import make_tokenizer
from tests.weights.test_processes import contents, numbers

pytestmark = pytest.mark.drills
STEPS = 4
WHO: list[Callable[[pytest.MonkeyPatch], object]] = [replay_renames, keep_files_in_use]


def train(directory: Path, *more: str) -> Path:
    """Trains half of a run, and then the rest of it, from a text of its own."""
    directory.mkdir(exist_ok=True)
    keys = ["train.batch_size=8", "mesh.fsdp=8", f"train.steps={STEPS}", "train.eval_every=2", "checkpoint.every=1"]
    config = write_config(directory)
    for stop in (["train.stop_at_step=2"], []):
        Trainer(load_config(config, [*keys, *stop, *more]), say=str).run()
    return directory / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed") / "place")


def names(directory: Path) -> set[str]:
    """What lies in there, with the same name for all that have random ones, of which there may be more or less."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return {re.sub(r"[0-9a-f]{24,}|events\.out.*", "*", name) for name in found}


@pytest.mark.parametrize("otherwise", WHO)
def test_a_run(undisturbed, tmp_path, monkeypatch, otherwise):
    with monkeypatch.context() as patch:
        seen = otherwise(patch)
        run = train(tmp_path / "place")
        if otherwise is replay_renames:
            done = {re.sub("-.*", "", path.name) for path in seen}
            assert done >= {"config.yaml", "metrics.jsonl", "goodput.json", "meta.json", "manifest.json", "tokens"}
    assert losses(run) == losses(undisturbed)
    assert (run / "config.yaml").read_text() == (undisturbed / "config.yaml").read_text().replace(
        str(undisturbed.parent), str(tmp_path / "place")
    )
    for step in range(STEPS - 1, STEPS + 1):
        assert parameters(run, step) == parameters(undisturbed, step)
    assert names(tmp_path / "place") == names(undisturbed.parent)


@pytest.mark.parametrize("otherwise", WHO)
def test_imports_and_exports(tmp_path, monkeypatch, otherwise):
    model = small()
    write(tmp_path / "hf", "hf", classic(model, "bfloat16"), model, "bfloat16")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(make_tokenizer(model.vocab_size))

    def there_and_back(place: Path) -> None:
        VERBS["import"]([str(tmp_path / "hf"), str(place / "import")])
        for name in ("hf", "mistral-fused", "checkpoint"):
            VERBS["export"]([str(place / "import"), str(place / name), "--format", name])

    there_and_back(tmp_path / "expected")
    with monkeypatch.context() as patch:
        otherwise(patch)
        there_and_back(tmp_path / "found")
    for name in ("hf", "mistral-fused"):
        assert contents(tmp_path / "found" / name) == contents(tmp_path / "expected" / name)
    for name in ("import", "checkpoint"):
        assert numbers(tmp_path / "found" / name) == numbers(tmp_path / "expected" / name)
    assert names(tmp_path / "found") == names(tmp_path / "expected")


def test_one_file_takes_the_place_of_another(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("old")
    replay_renames(monkeypatch)
    write_whole(tmp_path / "out", b"new")
    with new_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "new", "file": "new"}


def lose(partial: Path, target: Path, there: bool) -> None:
    partial.rmdir()
    if there:
        target.mkdir()


def export_and_lose(target: Path, there: bool) -> None:
    with new_directory(target) as partial:
        lose(partial, target, there)


def build_and_lose(target: Path, there: bool) -> None:
    with locked(target), building(target) as partial:
        lose(partial, target, there)


@pytest.mark.parametrize("there", [True, False])
def test_what_is_gone_is_not_taken_for_what_another_has_put_there(tmp_path, there):
    with pytest.raises(UserError, match=r"cannot write .*/out \(No such file or directory\): free some space or"):
        export_and_lose(tmp_path / "out", there)
    with pytest.raises(UserError, match=r"cannot write the data cache .*: No such file or directory; free space"):
        build_and_lose(tmp_path / "cache", there)


def test_what_another_has_put_there_in_between_is_not_taken_for_ours(tmp_path, monkeypatch):
    def replay_late(path: Path, target: Path) -> None:
        rename(path, target)
        write_whole(target, b"theirs")
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    rename = os.rename
    monkeypatch.setattr(
        os, "replace", lambda path, target: (replay_late if path.name == "new" else rename)(path, target)
    )
    (tmp_path / "new").write_text("mine")
    with open(tmp_path / "new"), pytest.raises(FileNotFoundError):  # open: no other file gets its number
        move(tmp_path / "new", tmp_path / "out")


@pytest.fixture
def checkpoints(tmp_path):
    said = list[str]()
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=1), said.append)
    checkpoints.said = said
    return checkpoints


@pytest.mark.parametrize("name", ["meta.json", "state/params/*/d/*", "manifest.json", "state/_CHECKPOINT_METADATA"])
def test_an_old_checkpoint_that_is_read_is_removed_by_a_later_save(checkpoints, monkeypatch, name):
    """Whichever of its files stays, and whatever else is removed before the directory cannot be."""
    save(checkpoints, 1)
    in_use = keep_files_in_use(monkeypatch)
    with contextlib.ExitStack() as stack:
        for file in (checkpoints.directory / "1").glob(name):
            stack.enter_context(open(file))
        save(checkpoints, 2)
        assert in_use()
        (said,) = checkpoints.said
        assert said.startswith(f"warning: the old checkpoint {checkpoints.directory / '1'} could not be removed: ")
        assert said.endswith(("Directory not empty", "Device or resource busy"))
    in_use()
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]
    assert_good(checkpoints, 3)


def test_an_unfinished_checkpoint_that_is_read_is_one_sentence(checkpoints, monkeypatch):
    save(checkpoints, 1)
    (checkpoints.directory / "1" / "manifest.json").unlink()
    in_use = keep_files_in_use(monkeypatch)
    with (
        open(checkpoints.directory / "1" / "meta.json"),
        pytest.raises(UserError, match=r"checkpoint 1 could not be written to .*: Directory not empty; fix that and"),
    ):
        save(checkpoints, 1)
    in_use()
    save(checkpoints, 1)
    assert_good(checkpoints, 1)


def test_a_token_cache_that_is_read_is_one_sentence(tmp_path, monkeypatch):
    def build() -> None:
        with locked(tmp_path / "cache"), building(tmp_path / "cache") as partial:
            (partial / "tokens").write_bytes(b"tokens")

    build()
    in_use = keep_files_in_use(monkeypatch)
    with (
        open(tmp_path / "cache" / "tokens"),
        pytest.raises(UserError, match=r"cannot write the data cache .*: Directory not empty; free space there or set"),
    ):
        build()
    in_use()
    build()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cache.lock"]


def test_what_an_import_leaves_goes_later(tmp_path, monkeypatch):
    in_use = keep_files_in_use(monkeypatch)
    place, remove = make_place(tmp_path / ".out")
    place.mkdir()
    (place / "tensors").write_bytes(b"half")
    with open(place / "tensors"):
        remove()
        assert in_use()
    in_use()
    _, remove = make_place(tmp_path / ".out")
    assert len(list(tmp_path.iterdir())) == 1
    remove()
    assert not list(tmp_path.iterdir())


def test_a_run_begins_beside_the_lock_that_another_has_just_removed(tmp_path):
    (tmp_path / ".nfs0000000000000001").touch()
    with RunDirectory(tmp_path, tiny_config()) as run:
        run.write_config()
    assert (tmp_path / "config.yaml").exists()
