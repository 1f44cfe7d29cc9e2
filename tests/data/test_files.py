"""Which files a path names: each once, names before patterns, and what was left out in a line."""

import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.data.sources import SUFFIXES, check_sources, iter_documents
from mixtral_jax.data.tokenizer import load_tokenizer


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}, schema=pa.schema([("text", pa.string())])), path)
    elif path.suffix == ".txt":
        path.write_text("".join(texts))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(path: Path | str) -> list[str]:
    return list(iter_documents(SourceConfig(name="mine", path=str(path))))


@pytest.fixture
def said(caplog):
    def said(*paths: Path) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_sources([SourceConfig(name=f"s{number}", path=str(path)) for number, path in enumerate(paths)])
        return caplog.messages

    return said


def test_hidden_files_and_directories_are_left_out_and_counted(tmp_path, said):
    write(tmp_path / "notes.jsonl", "one", "two")
    write(tmp_path / ".ipynb_checkpoints" / "notes-checkpoint.jsonl", "one")
    (tmp_path / "._notes.jsonl").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / "table.csv").write_text("a,b")
    assert read(tmp_path) == read(tmp_path / "*.jsonl") == read(tmp_path / "**" / "*.jsonl") == ["one", "two"]
    assert said(tmp_path) == ["source 's0': 1 files; left out: 2 hidden, 1 of another kind (.csv)"]
    assert read(write(tmp_path / ".named.jsonl", "named")) == ["named"]
    assert read(write(tmp_path / ".data" / "x.jsonl", "below").parent) == ["below"]


def test_a_file_counts_once_however_many_ways_lead_to_it(tmp_path, said):
    write(tmp_path / "b.jsonl", "b")
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    os.link(tmp_path / "b.jsonl", tmp_path / "c.jsonl")
    (tmp_path / "latest").symlink_to("b.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    assert read(tmp_path) == read(tmp_path / "*.jsonl") == ["b"]
    (line,) = said(tmp_path)
    assert line == (
        "source 's0': 1 files; left out: 1 broken links, 2 links to what is there already, 1 of another kind (latest)"
    )


def test_linked_directories_are_followed_and_loops_end(tmp_path, said):
    for number in range(5):
        write(tmp_path / "here" / f"{number}.txt", f"here {number}")
    for number in range(60):
        write(tmp_path / "far" / "below" / f"{number}.txt", f"far {number}")
    (tmp_path / "here" / "shards").symlink_to(tmp_path / "far")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "far" / "below")
    (tmp_path / "far" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "far" / "below" / "self").symlink_to("self")
    for path in (tmp_path / "here", tmp_path / "here" / "**", tmp_path / "here" / "**" / "*.txt"):
        assert len(read(path)) == len(set(read(path))) == 65
    assert "2 links to what is there already" in said(tmp_path / "here")[0]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_a_name_that_exists_is_no_pattern(tmp_path, suffix):
    for name in ("part[1]", "part1", "part2"):
        write(tmp_path / "data [2024]" / f"{name}{suffix}", name)
    folder = tmp_path / "data [2024]"
    assert read(folder / f"part[1]{suffix}") == ["part[1]"]
    assert read(folder / f"part[12]{suffix}") == ["part1", "part2"]
    for path in (folder, folder / "*", tmp_path / "*" / f"part*{suffix}"):
        assert read(path) == ["part1", "part2", "part[1]"]
    assert read(tmp_path / "data*" / f"part[1]{suffix}") == ["part[1]"]
    assert read(tmp_path / "data [[]2024]" / f"part1{suffix}") == ["part1"]


def test_a_pattern_may_be_relative_or_of_the_home(tmp_path, monkeypatch):
    write(tmp_path / "a" / "x.txt", "x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("*/x.txt") == read("./a/*.txt") == read("a/../a/?.txt") == read("~/a/*.txt") == ["x"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_of_any_kind_is_left_out(tmp_path, said, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(UserError, match=r"^source 'mine' \(.*\) holds no text: name files that do$"):
        read(tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match=r"^source 'mine' \(.*\) holds no text: name files that do$"):
        read(tmp_path)
    write(tmp_path / "b.jsonl", "b")
    assert read(tmp_path) == read(tmp_path / "*") == ["b"]
    assert said(tmp_path) == ["source 's0': 1 files; left out: 1 empty"]


def test_a_table_without_rows_is_as_empty_as_a_file(tmp_path):
    write(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds no text"):
        read(tmp_path)
    assert read(write(tmp_path / "b.parquet", "b").parent) == ["b"]


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_a_tokenizer_trained_on_no_text_is_one_sentence(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    data = DataConfig(
        sources=[SourceConfig(name="mine", path=str(tmp_path / "a.txt"))], tokenizer="train", cache_dir=str(tmp_path)
    )
    with pytest.raises(UserError, match=r"^source 'mine' \(.*a.txt\) holds no text: name files that do$"):
        load_tokenizer(data, 300)


def test_files_that_two_sources_share_are_said(tmp_path, said):
    for name in "abc":
        write(tmp_path / "x" / f"{name}.jsonl", name)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "link.jsonl").symlink_to(tmp_path / "x" / "a.jsonl")
    sentence = "sources 's0' and 's1' share {} files: their text counts in both, for training or held out"
    assert said(tmp_path / "x", tmp_path / "x" / "*.jsonl") == [sentence.format(3)]
    assert said(tmp_path / "x", tmp_path / "y") == [sentence.format(1)]
    assert said(tmp_path / "x" / "a.jsonl", tmp_path / "x" / "b.jsonl") == []


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a")
    scandir = os.scandir

    def forbid(path):
        if Path(path) == tmp_path / "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(UserError, match=r"^source 'mine' of data.sources: cannot list .*locked: Permission denied; "):
        read(tmp_path)
