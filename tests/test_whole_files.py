"""Nothing appears half-written, and what a killed process has left is taken over or removed, nothing else is."""

import errno
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mixtral_jax.whole_files import make_place, replacing, write_whole

pytestmark = pytest.mark.drills


def killed(act: Callable[[], object]) -> None:
    """Does something in a process that is killed when it is done."""
    if not (child := os.fork()):
        act()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def half_write(target: Path) -> None:
    with replacing(target) as file:
        file.write(b"half of it, " * 1000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_half_written_file_is_taken_over(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    killed(lambda: half_write(tmp_path / "file"))
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "file").read_bytes() == b"old"
    write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", "no bytes")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_of_several_writers_each_writes_a_whole_file(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]

    def write(content: bytes) -> None:
        with replacing(tmp_path / "file") as file:
            for start in range(0, len(content), 10_000):
                file.write(content[start : start + 10_000])
                file.flush()
                time.sleep(0.001)
        assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def fill_place(stem: Path) -> None:
    place, _ = make_place(stem)
    place.mkdir()
    (place / "tensors").write_bytes(b"half")


def test_what_a_killed_process_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed(lambda: fill_place(tmp_path / ".out"))
    (left,) = tmp_path.iterdir()
    mine = [tmp_path / name for name in (".out.mine.partial", ".outer.12345678.partial", ".out.12345678")]
    for path in mine:  # names like it, by others: no process of ours holds them, but none left them either
        path.mkdir()
    (mine[0] / "content").touch()
    (mine[1] / "lock").touch()
    with caplog.at_level(logging.WARNING):
        place, remove = make_place(tmp_path / ".out")
    assert f"removed {left}, which a killed process had left" in caplog.text
    assert not place.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*mine, place.parent])
    remove()
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_what_a_living_process_holds_stays(tmp_path: Path) -> None:
    first, remove_first = make_place(tmp_path / ".out")
    first.write_bytes(b"half")
    second, remove_second = make_place(tmp_path / ".out")
    assert first != second
    assert first.read_bytes() == b"half"
    remove_second()
    remove_first()
    assert not list(tmp_path.iterdir())


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    killed(lambda: fill_place(tmp_path / ".out"))
    _, remove = make_place(tmp_path / ".out")
    assert len(list(tmp_path.iterdir())) == 2  # who knows whether another host is at work on it
    remove()
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_links_of_others_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("lock", "content"):
        (tmp_path / "theirs" / name).touch()
    (tmp_path / ".out.12345678.partial").symlink_to("theirs")
    _, remove = make_place(tmp_path / ".out")
    remove()
    assert len(list((tmp_path / "theirs").iterdir())) == 2


def test_a_place_is_private(tmp_path: Path) -> None:
    place, remove = make_place(tmp_path / ".out")
    assert place.parent.stat().st_mode & 0o777 == 0o700
    remove()
