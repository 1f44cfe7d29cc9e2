"""Where an import or export may go: checked before the work, and nothing but its own files is touched."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.weights.destination import check_new, new_directory


def fill(directory: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    with new_directory(directory) as partial:
        (partial / "file").write_text("new")
        meanwhile()


def throw(failure: BaseException) -> None:
    raise failure


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("no"), OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    for name in ("out", "deep/er/out"):
        with pytest.raises(UserError if isinstance(failure, OSError) else type(failure)):
            fill(tmp_path / name, lambda: throw(failure))
        assert sorted(tmp_path.rglob("*")) == before
    fill(tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").exists()


def test_two_at_once_do_not_break_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not empty"):
        fill(tmp_path / "out", lambda: fill(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "new"


def test_places_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "here" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "in")
    before = sorted(tmp_path.rglob("*"))
    for name, words in (
        ("file", "not empty"), ("full", "not empty"), ("dangling", "link to nothing"), ("circle", "link to nothing"),
        ("here", "where you are"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            check_new(tmp_path / name)
    for name in (".", "..", "", "/"):
        with pytest.raises(UserError, match="where you are"):
            check_new(Path(name))
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        fill(tmp_path / "file" / "out")
    assert sorted(tmp_path.rglob("*")) == before
