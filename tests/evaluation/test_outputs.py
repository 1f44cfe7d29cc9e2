"""--json to whatever the user names: written through links and pipes, and refused before the work."""

import json
import os
import threading
from pathlib import Path

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.evaluation.outputs import check_writable, write_json

NUMBERS = {"name": "é", "value": 1.5}


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.json").symlink_to("real.json")
    (tmp_path / "fresh.json").symlink_to("elsewhere/fresh.json")
    for link, target in (("link.json", "real.json"), ("fresh.json", "elsewhere/fresh.json")):
        check_writable(tmp_path / link)
        write_json(tmp_path / link, NUMBERS)
        assert (tmp_path / link).is_symlink()
        assert json.loads((tmp_path / target).read_text(encoding="utf-8")) == NUMBERS
    assert not list(tmp_path.rglob("*.partial"))


def test_a_pipe_gets_the_text(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text(encoding="utf-8")))
    reader.start()
    check_writable(pipe)
    write_json(pipe, NUMBERS)
    reader.join()
    assert json.loads(got[0]) == NUMBERS
    assert pipe.is_fifo()


def test_devices_stay_what_they_are() -> None:
    reads, writes = os.openpty()  # a terminal of the test's own: in some containers /dev/null is a plain file
    terminal = Path(os.ttyname(writes))
    before = os.lstat(terminal)
    check_writable(terminal)
    write_json(terminal, NUMBERS)
    assert json.loads(os.read(reads, 1000)) == NUMBERS
    assert (os.lstat(terminal).st_rdev, os.lstat(terminal).st_mode) == (before.st_rdev, before.st_mode)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
def test_a_full_device_is_said_and_stays() -> None:
    before = os.lstat("/dev/full")
    check_writable(Path("/dev/full"))
    with pytest.raises(UserError, match="No space left on device"):
        write_json(Path("/dev/full"), NUMBERS)
    assert (os.lstat("/dev/full").st_rdev, os.lstat("/dev/full").st_mode) == (before.st_rdev, before.st_mode)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("none/file")
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.rglob("*"))
    for name, words in (
        ("", "it is a directory"), ("none/out.json", "no such directory"), ("link", "no such directory"),
        ("file/out.json", "no such directory"), ("circle", "loop"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"cannot write .*{words}.*another file to --json"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new.json")
    assert sorted(tmp_path.rglob("*")) == before
