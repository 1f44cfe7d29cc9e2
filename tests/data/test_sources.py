"""Sources: every format gives the same documents, and every mistake one sentence."""

import gzip
import json
import logging
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data import sources
from mixtral_jax.data.sources import (
    SUFFIXES,
    check_sources,
    iter_documents,
    iter_records,
    source_fingerprint,
    total_bytes,
)
from tests.limits import mapping_at_most

TEXTS = ["One.\nTwo lines.", "  größer 😀\r\n", "third\ttext"]
COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress}


def source(path, **kwargs):
    return SourceConfig(name="mine", path=str(path), **kwargs)


def read(path, **kwargs):
    return list(iter_documents(source(path, **kwargs)))


def write_records(path, texts, field="text"):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(texts))), field: texts}), path)
        return path
    data = "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


def complaint(path, **kwargs):
    with pytest.raises(UserError) as caught:
        read(path, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if "txt" not in suffix and "md" not in suffix])
def test_every_record_format_gives_its_records_in_order(tmp_path, suffix):
    texts = [f"{text} {number}" for number in range(1100) for text in TEXTS]
    assert read(write_records(tmp_path / f"a{suffix}", texts)) == texts
    assert read(write_records(tmp_path / f"b{suffix}", TEXTS, "body"), text_field="body") == TEXTS


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if "txt" in suffix or "md" in suffix])
def test_a_text_file_is_one_document_with_every_character_kept(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(TEXTS[1].encode()))
    assert read(path) == [TEXTS[1]]


def test_a_directory_and_a_glob_are_all_files_sorted(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/z.txt", "c.txt", "a.md", "b/y.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert read(tmp_path) == ["a.md", "b/y.txt", "b/z.txt", "c.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["b/y.txt", "b/z.txt", "c.txt"]


def test_blank_documents_and_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n   \n{"text": " \\n"}\n{"text": "two"}')
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_progress_reaches_the_size_of_the_files(tmp_path, name):
    path = tmp_path / name
    if "txt" in name:
        path.write_bytes(zstandard.compress(b"hello " * 1000))
    else:
        write_records(path, TEXTS * 1000)
    told = []
    assert list(iter_documents(source(path), told.append))
    assert min(told) >= 0
    assert sum(told) == total_bytes(source(path)) == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut off', "line 3 is not a JSON record"),
        (b'["text"]', "line 3 holds a JSON list"),
        (b'{"body": "x", "id": 1}', "line 3 has no field 'text' (it has body, id): set text_field"),
        (b'{"text": 5}', "line 3: the field 'text' holds int, not text"),
        (b'{"text": null}', "line 3: the field 'text' is null: leave the record out"),
        (b'{"text": "\xff"}', "line 3 is not UTF-8 (byte 10)"),
        (b'{"text": "\\ud800"}', "line 3: the field 'text' holds half of a surrogate pair"),
        (b"[" * 100_000, "line 3 is not a JSON record"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    assert f"{path}, {problem}" in complaint(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_and_false_compression_are_named(tmp_path, suffix):
    path = write_records(tmp_path / f"a.jsonl{suffix}", [str(number**3) for number in range(5000)])
    path.write_bytes(path.read_bytes()[:-1])
    assert complaint(path).startswith(f"cannot read {path}: Truncated")
    path.write_bytes(b"no compression here")
    assert complaint(path).startswith(f"cannot read {path}: ")


def test_damaged_parquet_and_missing_column_are_named(tmp_path, caplog):
    path = write_records(tmp_path / "a.parquet", TEXTS)
    assert complaint(path, text_field="body") == f"{path} has no column 'body': set text_field to one that holds text"
    assert complaint(path, text_field="id") == f"{path}, row 1: the field 'id' holds int, not text: set text_field"
    path.write_bytes(path.read_bytes()[:-10])
    logging.getLogger("datasets").addHandler(caplog.handler)
    assert complaint(path).startswith(f"cannot read {path}: Parquet magic bytes not found")
    logging.getLogger("datasets").removeHandler(caplog.handler)
    assert not caplog.text  # the library would log what it raises


def test_parquet_leaves_no_file_in_the_home(tmp_path, monkeypatch):
    path = write_records(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    assert read(path) == TEXTS
    assert not (tmp_path / "home").exists()


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    assert "nothing matches the path" in complaint(tmp_path / "missing.txt")
    assert "nothing matches the path" in complaint(tmp_path / "*.jsonl")
    assert "holds no file that ends in .parquet, .txt" in complaint(tmp_path / "empty")
    assert complaint(tmp_path / "blank.txt").startswith("source 'mine' (")
    assert "cannot read files such as" in complaint(tmp_path / "a.pdf")
    assert "cannot read files such as" in complaint(tmp_path / "*")
    assert "latin.txt is not UTF-8 (byte 2)" in complaint(tmp_path / "latin.txt")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    hub = SourceConfig(name="far", hub="someone/something")
    for attempt in (lambda: check_sources([hub]), lambda: list(iter_documents(hub))):
        with pytest.raises(
            UserError, match="source 'far': cannot read 'someone/something' from the data hub"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not written as name or name:config:split"):
        check_sources([SourceConfig(name="far", hub="a:b:c:d")])


def test_a_hubs_records_are_streamed_and_their_trouble_told(monkeypatch):
    asked = []

    def load_dataset(repository, config, *, split, streaming, cache_dir):
        asked.append((repository, config, split, streaming))
        yield from [{"text": "one"}, {"text": " "}, {"text": "two"}]
        if config:
            raise OSError("the line went dead\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(iter_documents(SourceConfig(name="far", hub="a/b"))) == ["one", "two"]
    with pytest.raises(UserError, match=r"^source 'far': cannot read 'a/b:c:test' .*\(the line went dead\)"):
        list(iter_documents(SourceConfig(name="far", hub="a/b:c:test")))
    with pytest.raises(UserError, match=r"'a/b' has no field 'body' \(it has text\): set text_field of source 'far'"):
        list(iter_documents(SourceConfig(name="far", hub="a/b", text_field="body")))
    assert asked[:2] == [("a/b", None, "train", True), ("a/b", "c", "test", True)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "list.jsonl"])
@pytest.mark.parametrize("end", COMPRESS)
def test_a_small_file_needs_little_memory(tmp_path, name, end):
    text = {"a.txt": b"one", "a.jsonl": b'{"text": "one"}\n', "list.jsonl": b'[{"text": "one"}]'}[name]
    path = tmp_path / (name + end)
    path.write_bytes(COMPRESS[end](text))
    read_all = iter_records if name == "list.jsonl" else iter_documents
    assert len(list(read_all(SourceConfig(name="x", path=str(path))))) == 1
    with mapping_at_most(256 << 20):
        assert len(list(read_all(SourceConfig(name="x", path=str(path))))) == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "list.jsonl"])
@pytest.mark.parametrize("end", COMPRESS)
def test_a_small_file_that_unpacks_to_a_large_one_takes_no_memory(tmp_path, monkeypatch, name, end):
    monkeypatch.setattr(sources, "LONGEST", 1 << 20)
    path = tmp_path / (name + end)
    path.write_bytes(COMPRESS[end]({"list.jsonl": b"["}.get(name, b"x") + b"x" * (64 << 20)))
    read_all = iter_records if name == "list.jsonl" else iter_documents  # a list may hold chats alone
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"more than 1 MiB in one piece: split it"):
            list(read_all(source(path)))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_the_fingerprint_follows_files_and_field_but_not_the_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    first = source_fingerprint(source(path))
    assert first == source_fingerprint(SourceConfig(name="other", path=str(path), weight=3.0))
    assert first != source_fingerprint(source(path, text_field="body"))
    stat = path.stat()
    path.write_text("abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert first != source_fingerprint(source(path))
    (tmp_path / "b.txt").write_text("b")
    assert source_fingerprint(source(tmp_path)) != source_fingerprint(source(path))
