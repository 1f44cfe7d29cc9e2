"""What breaks under a run's directory while checkpoints and figures are written, and how the run goes on."""

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from mixtral_jax import cli
from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.data.cache_files import cache_directory, locked
from mixtral_jax.runs import checkpoint as module
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runs.metrics_file import MetricsFile, read_metrics
from mixtral_jax.runs.run_dir import RunDirectory
from mixtral_jax.runs.tensorboard import TensorBoard
from tests.limits import limited, mapping_at_most
from tests.processes import fork
from tests.tiny import tiny_config

pytestmark = pytest.mark.drills
ROOM = 100_000  # bytes that a file may have where a state of `SIZE` does not fit
ROOM_OF_MEMORY = 16 << 20  # bytes that a process may still map
SIZE = (300, 300)  # of numbers that no compression makes smaller


def state(step: int) -> dict:
    return {"params": {"w": np.random.default_rng(step).standard_normal(SIZE).astype(np.float32)}}


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, jax.device_put(state(step)), {}, {})
    checkpoints.wait()


def restored(checkpoints: Checkpoints, step: int) -> bytes:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": {"w": jax.ShapeDtypeStruct(SIZE, np.float32, sharding=one)}}
    return np.asarray(checkpoints.restore(step, wanted)["params"]["w"]).tobytes()


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    return Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2), said.append)


def assert_good(checkpoints: Checkpoints, step: int) -> None:
    assert checkpoints.latest() == step
    assert restored(checkpoints, step) == state(step)["params"]["w"].tobytes()


def test_a_disk_that_fills_up_in_a_save_leaves_the_one_before_and_the_next_works(checkpoints):
    save(checkpoints, 1)
    with (
        limited(resource.RLIMIT_FSIZE, ROOM),
        pytest.raises(UserError, match=r"checkpoint 2 could not be written .* File too large; .* earlier .* intact"),
    ):
        save(checkpoints, 2)
    assert checkpoints.steps() == [1]
    assert_good(checkpoints, 1)
    save(checkpoints, 3)
    assert_good(checkpoints, 3)


@contextlib.contextmanager
def open_files_left(count: int) -> Iterator[None]:
    """Leaves this process so many files to open."""
    with limited(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 2 + count):
        held = []
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        try:
            for _ in range(count):
                os.close(held.pop())
            yield
        finally:
            for file in held:
                os.close(file)


def save_without_files(directory: Path) -> None:
    def main(arguments: list[str]) -> None:
        checkpoints = Checkpoints(directory, CheckpointConfig(keep=2))
        save(checkpoints, 1)
        with (
            open_files_left(5),
            pytest.raises(
                UserError, match=r"checkpoint 2 could not be written .* Too many open files; .* intact"
            ) as told,
        ):
            save(checkpoints, 2)
        assert_good(checkpoints, 1)
        save(checkpoints, 3)
        assert_good(checkpoints, 3)
        raise told.value

    cli.PATIENCE = 1
    cli.run(main)


def test_a_limit_of_open_files_is_one_sentence_and_the_next_save_works(checkpoints):
    """In a process of its own: threads and event loops of libraries stay behind half-made, and go with it."""
    process = fork(save_without_files, checkpoints.directory)
    process.join(60)
    assert process.exitcode == 2
    assert_good(checkpoints, 3)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(file: Path) -> None:
    """Takes all room that there is."""
    with open(file, "wb", buffering=0) as taken, contextlib.suppress(OSError):
        while True:
            taken.write(bytes(1 << 12))


def test_a_small_file_system_that_fills_up_refuses_a_save_and_takes_the_next(small_disk, said, monkeypatch):
    checkpoints = Checkpoints(small_disk / "checkpoints", CheckpointConfig(keep=2), said.append)
    save(checkpoints, 1)
    fill(small_disk / "other")
    with pytest.raises(UserError, match=r"no room for a checkpoint in .*: .* the earlier checkpoints are intact"):
        save(checkpoints, 2)
    assert_good(checkpoints, 1)
    (small_disk / "other").unlink()
    with monkeypatch.context() as patch:  # room was found, and is gone where the arrays are written
        patch.setattr(module, "check_room", lambda *_: fill(small_disk / "other"))
        with pytest.raises(UserError, match=r"checkpoint 2 could not be written .*: the disk is full; .* intact"):
            save(checkpoints, 2)
    assert_good(checkpoints, 1)
    (small_disk / "other").unlink()
    save(checkpoints, 3)
    assert_good(checkpoints, 3)


def test_a_file_system_that_becomes_read_only_refuses_a_save_and_a_run_and_takes_the_next(small_disk, said):
    checkpoints = Checkpoints(small_disk / "checkpoints", CheckpointConfig(keep=2), said.append)
    save(checkpoints, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    try:
        with pytest.raises(UserError, match=r"checkpoint 2 could not be written .*: Read-only file system; .* intact"):
            save(checkpoints, 2)
        with pytest.raises(UserError, match=r"cannot write run_dir .*: Read-only file system; make room or name"):
            RunDirectory(small_disk / "run", tiny_config())
        with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: Read-only file system; fix that"):
            MetricsFile(small_disk / "metrics.jsonl", 0)
        with pytest.raises(UserError, match=r"cannot write the data cache .*: Read-only file system"):
            cache_directory(str(small_disk / "cache"))
        assert_good(checkpoints, 1)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    save(checkpoints, 3)
    assert_good(checkpoints, 3)


def test_a_disk_that_fills_up_in_the_log_loses_no_line_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file, written = MetricsFile(path, 0), 0

    def fill():
        nonlocal written
        while True:
            file.write(written + 1, {"loss": 1 / 3}, {})
            written += 1

    with (
        limited(resource.RLIMIT_FSIZE, 1000),
        pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: File too large; fix that and start"),
    ):
        fill()
    file.close()
    assert not path.read_bytes().endswith(b"\n")  # a part of the next line
    again = MetricsFile(path, written - 1)
    again.write(written, {"loss": 0.5}, {})
    again.close()
    assert [entry["step"] for entry in read_metrics(path)] == list(range(1, written + 1))


def test_a_disk_that_fills_up_in_tensorboard_s_file_is_one_sentence(tmp_path):
    board = TensorBoard(tmp_path, 0, {})
    load = {"expert_load": np.full((2, 4), 0.25)}

    def fill():
        for step in range(1000):
            board.write(step, {"loss": 1.0}, load)

    with limited(resource.RLIMIT_FSIZE, ROOM), pytest.raises(UserError, match=r"cannot write .*: File too large; fix"):
        fill()
    board.close()


def test_tensorboard_s_own_thread_writes_nothing(tmp_path, monkeypatch):
    """It ends at a full disk or when the clock is set back, and closing would then wait for ever."""
    threads, write = set(), EventsWriter.write_event

    def noted(self, event):
        threads.add(threading.current_thread())
        return write(self, event)

    monkeypatch.setattr(EventsWriter, "write_event", noted)
    board = TensorBoard(tmp_path, 0, {})
    board.write(1, {"loss": 1.0}, {})
    board.close()
    assert threads == {threading.current_thread()}


def save_and_die(directory: Path, at: str) -> None:
    """Saves two checkpoints and dies in the second, where it begins or where it would be sealed."""
    checkpoints = Checkpoints(directory, CheckpointConfig())
    save(checkpoints, 1)
    real = getattr(module, at)
    module.__dict__[at] = lambda *args: os.kill(os.getpid(), signal.SIGKILL) or real(*args)
    save(checkpoints, 2)


@pytest.mark.parametrize("at", ["_save_item", "write_manifest"])
def test_a_process_killed_in_a_save_or_before_its_mark_leaves_the_one_before(checkpoints, said, at):
    process = fork(save_and_die, checkpoints.directory, at)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (checkpoints.directory / "2" / "state" / "params").exists() == (at == "write_manifest")
    assert_good(checkpoints, 1)
    assert "checkpoints/2 is passed over: it is unfinished: there is no manifest" in said[0]
    save(checkpoints, 2)
    assert_good(checkpoints, 2)


def save_without_memory(directory: Path) -> None:
    def main(arguments: list[str]) -> None:
        checkpoints = Checkpoints(directory, CheckpointConfig())
        save(checkpoints, 1)
        host = np.random.default_rng(2).random(ROOM_OF_MEMORY, np.float32)  # held to the end: its room would be found
        large = {"params": {"w": jax.device_put(host)}}
        with mapping_at_most(ROOM_OF_MEMORY):  # a quarter of what it takes to compress and write that
            checkpoints.save(2, large, {}, {})
            checkpoints.wait()

    cli.PATIENCE = 1
    cli.run(main)


def test_a_process_that_gets_no_memory_in_a_save_ends_and_leaves_the_one_before(checkpoints):
    """What it says is the libraries' choice."""
    process = fork(save_without_memory, checkpoints.directory)
    process.join(60)
    assert process.exitcode
    assert_good(checkpoints, 1)
    save(checkpoints, 2)
    assert_good(checkpoints, 2)


def test_zeroed_files_are_found(checkpoints, said):
    save(checkpoints, 1)
    save(checkpoints, 2)
    for file in [path for path in (checkpoints.directory / "2").rglob("*") if path.is_file()]:
        content = file.read_bytes()
        file.write_bytes(bytes(len(content)))
        assert checkpoints.latest() == 1
        assert file.name in said[-1] or file.name == "manifest.json"
        file.write_bytes(content)
    assert_good(checkpoints, 2)


def test_saves_leave_no_file_and_no_thread_open(checkpoints):
    """In a whole run nothing grows, memory neither, which takes longer to see: `python -m tests.soak`."""
    held = []
    for step in range(1, 13):
        save(checkpoints, step)
        held.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert np.max(held[-4:], axis=0).tolist() == np.max(held[4:8], axis=0).tolist()


def test_a_directory_that_vanishes_is_made_again(checkpoints):
    save(checkpoints, 1)
    shutil.rmtree(checkpoints.directory)
    save(checkpoints, 2)
    assert_good(checkpoints, 2)


def test_on_a_slow_disk_a_save_waits_for_the_one_before(checkpoints, monkeypatch):
    written, go = module.write_manifest, threading.Event()
    monkeypatch.setattr(module, "write_manifest", lambda *args: go.wait(60) and written(*args))
    checkpoints.save(1, jax.device_put(state(1)), {}, {})  # comes back although nothing is sealed
    threading.Timer(0.2, go.set).start()
    checkpoints.save(2, jax.device_put(state(2)), {}, {})
    assert checkpoints.latest() in (1, 2)
    checkpoints.wait()
    for step in (1, 2):
        assert restored(checkpoints, step) == state(step)["params"]["w"].tobytes()
    assert_good(checkpoints, 2)


def test_a_run_that_was_killed_before_it_had_a_configuration_starts(tmp_path):
    with RunDirectory(tmp_path / "run", tiny_config()):
        (tmp_path / "run" / "config.yaml.partial").write_text("# Every")
    with RunDirectory(tmp_path / "run", tiny_config()) as run:
        run.write_config()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be locked .* \(No locks available\): choose a run_dir on"):
        RunDirectory(tmp_path / "run", tiny_config())
    with pytest.raises(UserError, match=r"cannot write the data cache .*: No locks available"), locked(tmp_path / "x"):
        pass


def test_a_home_that_cannot_be_written_is_one_sentence(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(UserError, match=r"cannot write the data cache /dev/null/\.cache/.* set data\.cache_dir"):
        cache_directory("")
