"""Import and export in two processes: the bytes of one, and nothing where one of them is lost."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax import __main__ as program
from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runs.sources import StoredArrays
from mixtral_jax.verbs import VERBS
from mixtral_jax.weights import checkpoints as module
from mixtral_jax.weights.importing import ReleasedArrays
from mixtral_jax.weights.safetensors_files import SafetensorsWriter
from tests.processes import HEARTBEAT, PATIENCE, fork, free_port, on_devices, without_noise
from tests.weights.models import small
from tests.weights.synthetic import classic, load, write
from tests.weights.test_bad_sources import make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.drills]

CONFIG = small(num_layers=5)  # more than one file of the fused Mistral format


def take_part(number: int, directory: Path, arguments: list[str], hangs: bool) -> None:
    """Is a process that runs a verb, and one that hangs says so in a file, once it has begun its work."""

    def hang(*_: Any) -> None:
        (directory / "hangs").touch()
        time.sleep(10 * PATIENCE)

    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(directory / f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if hangs:
        setattr(ReleasedArrays, "block", hang)  # noqa: B010
        setattr(SafetensorsWriter, "write", hang)  # noqa: B010
    sys.argv = ["mixtral_jax", *arguments]
    program.start()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Two:
    """Two processes on loopback that run a verb."""

    def __init__(self, directory: Path, *arguments: Any, hangs: int | None = None):
        directory.mkdir()
        self.directory, port, self.all = directory, free_port(), []
        for number in range(2):
            keys = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": number}
            keys["heartbeat_timeout"] = HEARTBEAT
            words = [*map(str, arguments), *(f"distributed.{key}={value}" for key, value in keys.items())]
            self.all.append(fork(take_part, number, directory, words, number == hangs, **on_devices()))

    def kill(self, number: int) -> None:
        """Kills what does the work of a process; its parent has the last word."""
        parent = self.all[number].pid
        (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)

    def read(self, name: str) -> str:
        return without_noise((self.directory / name).read_text())

    def end(self) -> list[int]:
        for process in self.all:
            process.join(PATIENCE)
        codes = [process.exitcode for process in self.all]
        assert None not in codes, [self.read(f"{number}.err") for number in range(2)]
        return codes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write(directory / "hf", "hf", classic(CONFIG, "bfloat16"), CONFIG, "bfloat16")
    (directory / "hf" / "tokenizer.model").write_bytes(make_tokenizer(CONFIG.vocab_size))
    VERBS["import"]([str(directory / "hf"), str(directory / "alone")])
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def numbers(directory: Path) -> dict[tuple[str, str], bytes]:
    """All arrays of an import, which must be as it was written."""
    checkpoints = Checkpoints(directory / "checkpoints", CheckpointConfig())
    assert checkpoints.latest() == 0
    parts = {part: dict(facts) for part, facts in checkpoints.read_meta(0)["arrays"].items()}
    stored = StoredArrays(directory / "checkpoints" / "0", parts)
    return {
        (part, name): stored.block(part, name, (0,) * len(leaf.shape), leaf.shape).tobytes()
        for part, leaves in stored.parts.items()
        for name, leaf in leaves.items()
    }


def test_two_import_what_one_does(source: Path, tmp_path: Path) -> None:
    two = Two(tmp_path / "log", "import", source / "hf", tmp_path / "import")
    assert two.end() == [0, 0], two.read("0.err")
    assert two.read("1.out") == ""
    assert two.read("0.out").count("a checkpoint for eval.py") == 1
    assert numbers(tmp_path / "import") == numbers(source / "alone")
    assert len(list((tmp_path / "import").rglob("params/written_by.1/d/*"))) > 1  # the second took its share
    VERBS["export"]([str(tmp_path / "import"), str(tmp_path / "out"), "--format", "hf"])
    there, back = load(source / "hf"), load(tmp_path / "out")
    assert {key: value.tobytes() for key, value in there.items()} == {k: value.tobytes() for k, value in back.items()}


@pytest.mark.parametrize("name", ["hf", "mistral-fused"])
def test_two_export_what_one_does(source: Path, tmp_path: Path, name: str) -> None:
    VERBS["export"]([str(source / "alone"), str(tmp_path / "one"), "--format", name])
    two = Two(tmp_path / "log", "export", source / "alone", tmp_path / "two", "--format", name)
    assert two.end() == [0, 0], two.read("0.err")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.pt"))) == 2 * (name == "mistral-fused")


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_lost_process_leaves_nothing(source: Path, tmp_path: Path, verb: str) -> None:
    arguments = {
        "import": ("import", source / "hf", tmp_path / "new" / "place"),
        "export": ("export", source / "alone", tmp_path / "new" / "place", "--format", "hf"),
    }[verb]
    two = Two(tmp_path / "log", *arguments, hangs=1)
    wait_for(tmp_path / "log" / "hangs")
    assert list((tmp_path / "new").iterdir())  # some of it is there, under another name
    assert not (tmp_path / "new" / "place").exists()
    two.kill(1)
    assert two.end() == [75, 75]
    said = two.read("0.err")
    assert said.startswith("error: process 1 on "), said
    assert said.count("\n") == 1, said
    assert said.endswith(
        "; look at its log, then start the same command again\n"
    )  # there is no checkpoint to go on from
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_a_killed_export_leaves_goes_at_the_next_start(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [str(source / "alone"), str(tmp_path / "place"), "--format", "hf"]
    (tmp_path / "log").mkdir()
    alone = fork(take_part, 0, tmp_path / "log", ["export", *arguments], True, **on_devices())
    wait_for(tmp_path / "log" / "hangs")
    alone.kill()
    alone.join()
    (left,) = (path for path in tmp_path.iterdir() if path.name != "log")
    VERBS["export"](arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "place"]
    assert f"removed {left}, which a killed process had left" in caplog.text


def test_so_does_what_an_import_leaves_whose_first_process_was_killed(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two = Two(tmp_path / "log", "import", source / "hf", tmp_path / "place", hangs=0)
    wait_for(tmp_path / "log" / "hangs")
    two.kill(0)
    assert two.end() == [75, 75]
    for number in range(2):
        last = two.read(f"{number}.err").splitlines()[-1]
        assert last.startswith("error: the process on "), last
        assert last.endswith(", then start the same command again"), last
    (left,) = (path for path in tmp_path.iterdir() if path.name != "log")
    VERBS["import"]([str(source / "hf"), str(tmp_path / "place")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "place"]
    assert f"removed {left}, which a killed process had left" in caplog.text


@pytest.mark.parametrize("name", ["gguf", "peft"])
def test_what_one_process_writes_alone(source: Path, tmp_path: Path, name: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "is_alone", lambda: False)
    monkeypatch.setattr(module, "check_target", lambda *_: None)  # the package gguf may be missing
    with pytest.raises(UserError, match=f"the format {name} is written by one process: .*num_processes=1"):
        module.export_checkpoint(source / "alone", tmp_path / "out.gguf", name, say=lambda text: None)
