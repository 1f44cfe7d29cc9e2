"""Import and export in two processes: the bytes of one, and nothing where one of them is lost."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax import __main__ as program
from mixtral_jax.config import CheckpointConfig, MeshConfig
from mixtral_jax.config_loading import parse_config, to_yaml
from mixtral_jax.data.record import FILE as RECORD
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.runs.restoring import ADAPTERS, describe_base
from mixtral_jax.runs.sources import StoredArrays
from mixtral_jax.runs.streaming import named_leaves
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import ANY_MESH, make_mesh
from mixtral_jax.verbs import VERBS
from mixtral_jax.weights.importing import ReleasedArrays
from mixtral_jax.weights.safetensors_files import SafetensorsWriter
from tests import small_run
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


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of adapters above a run."""
    base, directory = find_checkpoint(small_run.trained() / "run")[0], tmp_path_factory.mktemp("adapted")
    meta = base.read_meta(12)
    objective = ["objective.name=sft", "objective.lora_rank=3", "objective.lora_router=true"]
    changes = [*objective, f"init_from={base.directory.parent}", ANY_MESH]
    config = parse_config(meta["config"], changes, saved=True)
    own = Architecture(config.model, make_runtime(config, make_mesh(MeshConfig(), jax.devices()[:1])), config.objective)
    adapters = own.init_adapters(0)
    for number, pair in enumerate(adapters.values()):
        pair["b"] = jax.random.normal(jax.random.key(number), pair["b"].shape)
    bias = {name: jnp.zeros(leaf.shape) for name, leaf in named_leaves(own.abstract()["selection_bias"]).items()}
    facts = {**meta, "config": to_yaml(config), ADAPTERS: describe_base(base, 12)}
    with Checkpoints(directory / "checkpoints", CheckpointConfig()) as checkpoints:
        files = {name: base.read_file(12, name) for name in ("tokenizer.model", RECORD)}
        checkpoints.save(1, {"params": adapters, "selection_bias": bias}, facts, files)
    return directory


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def numbers(directory: Path) -> dict[tuple[str, str], bytes]:
    """All arrays of an import or of a model alone, which must be as it was written."""
    checkpoints = Checkpoints(directory / "checkpoints", CheckpointConfig())
    (step,) = checkpoints.steps()
    assert checkpoints.latest() == step
    parts = {part: dict(facts) for part, facts in checkpoints.read_meta(step)["arrays"].items()}
    stored = StoredArrays(directory / "checkpoints" / str(step), parts)
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


@pytest.mark.parametrize(
    ("of", "arguments"),
    [
        ("alone", ["hf"]), ("alone", ["mistral-fused"]), ("run", ["gguf", "--dtype", "Q8_0"]),
        ("adapted", ["peft"]), ("adapted", ["hf"]), ("adapted", ["checkpoint"]),
    ],
)  # fmt: skip
def test_two_export_what_one_does(source: Path, adapted: Path, tmp_path: Path, of: str, arguments: list[str]) -> None:
    if arguments[0] == "gguf":
        pytest.importorskip("gguf")
    place = {"alone": source / "alone", "run": small_run.trained() / "run", "adapted": adapted}[of]
    one, two = (tmp_path / f"{name}{'.gguf' * (arguments[0] == 'gguf')}" for name in ("one", "two"))
    VERBS["export"]([str(place), str(one), "--format", *arguments])
    both = Two(tmp_path / "log", "export", place, two, "--format", *arguments)
    assert both.end() == [0, 0], both.read("0.err")
    if arguments[0] == "checkpoint":
        assert numbers(two) == numbers(one)
    else:
        assert contents(two) == contents(one)
    assert len(list(tmp_path.glob("one/*.pt"))) == 2 * ("mistral-fused" in arguments)


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
