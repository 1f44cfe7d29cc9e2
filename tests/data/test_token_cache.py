"""The token cache: right tokens, built once and whole, whatever happens."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data import token_cache, tokenizer
from mixtral_jax.data.cache_files import cache_directory
from mixtral_jax.data.token_cache import open_or_build
from tests.limits import limited


@pytest.fixture
def source(tmp_path, write_corpus):
    (tmp_path / "text").mkdir()
    write_corpus(tmp_path / "text", [3, 500, 1, 40, 2000, 7])
    return SourceConfig(name="mine", path=str(tmp_path / "text"))


@pytest.fixture
def directory(tmp_path):
    return cache_directory(str(tmp_path / "cache"))


def contents(cache):
    return {file.name: file.read_bytes() for file in cache.directory.iterdir()}


def refuse_building(monkeypatch):
    monkeypatch.setattr(token_cache, "_build", lambda *args: pytest.fail("built again"))


def test_documents_are_their_tokens_between_bos_and_eos(source, directory, mixtral, tmp_path):
    cache = open_or_build(source, mixtral, directory)
    texts = [path.read_text() for path in sorted((tmp_path / "text").iterdir())]
    assert cache.num_documents == len(texts)
    for index, text in enumerate(texts):
        assert cache.document(index).tolist() == [1, *mixtral.encode(text), 2]
        assert cache.document_bytes[index] == len(text.encode())
    assert cache.num_tokens == cache.document_starts[-1] == len(cache.tokens)
    assert cache.tokens.dtype == np.uint16
    assert cache.name == "mine"


def test_a_large_vocabulary_takes_wider_tokens(source, directory, mixtral, monkeypatch):
    narrow = open_or_build(source, mixtral, directory).tokens
    monkeypatch.setattr(mixtral, "vocab_size", 70_000)
    wide = open_or_build(source, mixtral, cache_directory(str(directory / "other")))
    assert wide.tokens.dtype == np.uint32
    np.testing.assert_array_equal(wide.tokens, narrow)


def test_cores_batches_and_chunks_do_not_show_in_the_bytes(source, directory, mixtral, monkeypatch):
    first = contents(open_or_build(source, mixtral, directory))
    for cores, batch, chunk in ((1, 100, 50), (3, 5000, 1000)):
        monkeypatch.setattr(tokenizer, "_cores", lambda cores=cores: cores)
        monkeypatch.setattr(token_cache, "BATCH", batch)
        monkeypatch.setattr(tokenizer, "CHUNK", chunk)
        other = cache_directory(str(directory / f"{cores}"))
        assert contents(open_or_build(source, mixtral, other)) == first


def test_it_is_built_once(source, directory, mixtral, monkeypatch):
    first = open_or_build(source, mixtral, directory)
    refuse_building(monkeypatch)
    renamed = SourceConfig(name="renamed", path=source.path)
    second = open_or_build(renamed, mixtral, directory)
    assert (second.name, second.fingerprint) == ("renamed", first.fingerprint)
    assert not list(directory.glob("*.partial"))


def test_changed_text_or_tokenizer_gives_another_cache(source, directory, mixtral, tmp_path, monkeypatch):
    first = open_or_build(source, mixtral, directory)
    (tmp_path / "text" / "00002.txt").write_text("something else altogether")
    second = open_or_build(source, mixtral, directory)
    assert second.fingerprint != first.fingerprint
    assert mixtral.decode(second.document(2)) == "something else altogether"
    monkeypatch.setattr(mixtral, "fingerprint", "another")
    third = open_or_build(source, mixtral, directory)
    assert third.directory not in (first.directory, second.directory)


def test_a_touched_file_costs_a_cache_but_not_the_content_fingerprint(source, directory, mixtral, tmp_path):
    first = open_or_build(source, mixtral, directory)
    os.utime(tmp_path / "text" / "00002.txt", (1, 1))
    second = open_or_build(source, mixtral, directory)
    assert second.directory != first.directory
    assert second.fingerprint == first.fingerprint


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit in the tokens": lambda path: flip_a_bit(path / "tokens"),
    "a flipped bit in the starts": lambda path: flip_a_bit(path / "document_starts"),
    "truncated tokens": lambda path: os.truncate(path / "tokens", 100),
    "longer starts": lambda path: (path / "document_starts").open("ab").write(b"x"),
    "missing bytes": lambda path: (path / "document_bytes").unlink(),
    "missing index": lambda path: (path / "index.json").unlink(),
    "half an index": lambda path: os.truncate(path / "index.json", 20),
    "an index of another kind": lambda path: (path / "index.json").write_text("[]"),
    "another's files": lambda path: (path / "index.json").write_text(
        json.dumps(json.loads((path / "index.json").read_text()) | {"key": "0"})
    ),
}


@pytest.mark.drills
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_said_and_mended(source, directory, mixtral, damage, caplog):
    first = open_or_build(source, mixtral, directory)
    good = contents(first)
    DAMAGES[damage](first.directory)
    second = open_or_build(source, mixtral, directory)
    assert contents(second) == good
    assert f"the token cache {first.directory} is damaged" in caplog.text


def test_prepared_tokens_are_looked_at_once_and_again_where_they_are_copied_to(
    source, directory, mixtral, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_cache, "_key", lambda source, tokenizer, format: token_cache.prepared_key(tokenizer))
    built, copy = open_or_build(source, mixtral, directory).directory, tmp_path / "copy"
    shutil.copytree(built, copy)
    open_or_build(SourceConfig(name="mine", prepared=str(copy)), mixtral, directory)
    real, looks = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: looks.append(args) or real(*args))
    open_or_build(SourceConfig(name="mine", prepared=str(copy)), mixtral, directory)
    assert not looks
    again = shutil.move(copy, tmp_path / "again")
    open_or_build(SourceConfig(name="mine", prepared=str(again)), mixtral, directory)
    assert len(looks) == 3
    flip_a_bit(again / "document_bytes")
    with pytest.raises(
        UserError, match=r"cannot use the prepared tokens .*again \(document_bytes is not what was writ"
    ):
        open_or_build(SourceConfig(name="mine", prepared=str(again)), mixtral, directory)


def test_a_failure_leaves_nothing_behind_and_the_next_build_is_whole(source, directory, mixtral, tmp_path, monkeypatch):
    bad = tmp_path / "text" / "00004.jsonl"
    bad.write_text("{")
    monkeypatch.setattr(token_cache, "BATCH", 10)
    with pytest.raises(UserError, match=r"00004\.jsonl, line 1 is not a JSON record"):
        open_or_build(source, mixtral, directory)
    assert [path.suffix for path in directory.iterdir()] == [".lock"]
    bad.unlink()
    assert open_or_build(source, mixtral, directory).num_documents == 6


def test_leftovers_of_a_killed_builder_are_removed(source, directory, mixtral):
    first = open_or_build(source, mixtral, directory)
    good = contents(first)
    partial = first.directory.rename(first.directory.with_name(first.directory.name + ".partial"))
    os.truncate(partial / "tokens", 8)
    assert contents(open_or_build(source, mixtral, directory)) == good
    assert not partial.exists()


@pytest.mark.drills
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(source, directory, mixtral):
    with (
        limited(resource.RLIMIT_FSIZE, 2000),
        pytest.raises(UserError, match=r"cannot write the data cache .*: File too large; free space there or"),
    ):
        open_or_build(source, mixtral, directory)
    assert [path.suffix for path in directory.iterdir()] == [".lock"]
    assert open_or_build(source, mixtral, directory).num_documents == 6


CHANGES = {  # what the reader finds: a mistake, or what it opened
    "truncated": (lambda file: os.truncate(file, 10), True),
    "written to": (lambda file: flip_a_bit(file), True),
    "removed": (lambda file: file.unlink(), False),
    "replaced": (lambda file: shutil.copy(__file__, file.parent / "x") and (file.parent / "x").replace(file), False),
}  # fmt: skip


@pytest.mark.drills
@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_changes_under_a_run_is_named_or_does_no_harm(source, directory, mixtral, change):
    cache = open_or_build(source, mixtral, directory)
    before = cache.tokens.tolist()
    act, told = CHANGES[change]
    act(cache.directory / "tokens")
    if told:
        with pytest.raises(UserError, match=r"/tokens of source 'mine' was changed while the run reads it: leave"):
            cache.check_unchanged()
    else:
        cache.check_unchanged()
        assert cache.tokens.tolist() == before


def test_a_cache_directory_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the data cache .*/file/below: .*set data\.cache_dir"):
        cache_directory(str(tmp_path / "file" / "below"))


def test_files_that_change_while_they_are_read_are_noticed(source, directory, mixtral, tmp_path, monkeypatch):
    build = token_cache._build

    def build_and_touch(*args):
        build(*args)
        (tmp_path / "text" / "00000.txt").write_text("new")

    monkeypatch.setattr(token_cache, "_build", build_and_touch)
    with pytest.raises(UserError, match="the files of source 'mine' changed while they were read: start again"):
        open_or_build(source, mixtral, directory)


BUILDER = """
import sys, time
from pathlib import Path
from mixtral_jax.config import DataConfig, SourceConfig
from mixtral_jax.data import token_cache
from mixtral_jax.data.tokenizer import load_tokenizer
real = token_cache._build
def slow(*args):
    print("building", flush=True)
    time.sleep(1)
    real(*args)
token_cache._build = slow
tokenizer = load_tokenizer(DataConfig(tokenizer="mixtral"), 32000)
cache = token_cache.open_or_build(SourceConfig(name="mine", path=sys.argv[1]), tokenizer, Path(sys.argv[2]))
print(cache.fingerprint, "jax" in sys.modules, flush=True)
"""


def test_of_two_processes_one_builds_and_both_read_the_same_without_jax(source, directory, mixtral):
    command = [sys.executable, "-c", BUILDER, source.path, str(directory)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].split("\n") for process in both]
    assert sum(lines.count("building") for lines in outputs) == 1
    expected = open_or_build(source, mixtral, directory).fingerprint
    assert [lines[-2] for lines in outputs] == [f"{expected} False"] * 2
    assert len([path for path in directory.iterdir() if path.is_dir()]) == 1


@pytest.mark.drills
def test_the_lock_of_a_killed_builder_is_free(source, directory, mixtral):
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER.replace("sleep(1)", "sleep(600)"), source.path, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.wait()
    assert open_or_build(source, mixtral, directory).num_documents == 6
    assert not list(directory.glob("*.partial"))
