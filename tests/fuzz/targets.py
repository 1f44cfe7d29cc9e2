"""What reads bytes that others wrote, and valid ones of each kind to begin with.

A target takes bytes. It returns, or raises `UserError`; anything else is a finding.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.config_loading import parse_config, to_yaml
from mixtral_jax.data import token_cache
from mixtral_jax.data.answers import format_of
from mixtral_jax.data.cache_files import cache_directory
from mixtral_jax.data.fingerprints import fingerprints, make_fingerprints
from mixtral_jax.data.marked_records import marked_records
from mixtral_jax.data.sources import iter_documents
from mixtral_jax.data.token_cache import TokenCache, open_or_build
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluation.tasks import jsonl_task
from mixtral_jax.preparation.config import load_prepare_config
from mixtral_jax.preparation.decontamination import _texts
from mixtral_jax.runs.manifest import NAME, find_damage, write_manifest
from mixtral_jax.runs.metrics_file import read_metrics
from mixtral_jax.weights.files import read_files
from mixtral_jax.weights.released_config import read_description
from mixtral_jax.weights.released_tokenizer import read_tokenizer
from mixtral_jax.weights.safetensors_files import read_safetensors
from mixtral_jax.weights.torch_files import TorchWriter, read_torch
from tests.data.test_answers import LABELS, PAIRS
from tests.fuzz import samples
from tests.fuzz.samples import lines
from tests.fuzz.server import body
from tests.limits import mapping_at_most
from tests.preparation.pages import read, record
from tests.serving.server import tokenizer
from tests.tiny import TINY
from tests.weights.models import small
from tests.weights.synthetic import config_json, params_json

MEMORY = 2 << 30  # bytes beyond those in use that a target may map
SECONDS = 10  # that one input may take


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader and what it reads."""

    seeds: list[bytes]
    run: Callable[[bytes], object]

    def __call__(self, data: bytes) -> bool:
        """Reads, in bounded time and memory; returns whether nothing was wrong; if so, that is one line."""
        with mapping_at_most(MEMORY), seconds_at_most(SECONDS):
            try:
                self.run(data)
            except UserError as error:
                sentence = str(error)
            else:
                return True
        assert sentence.isprintable(), sentence
        return False


@contextlib.contextmanager
def seconds_at_most(count: int) -> Iterator[None]:
    """Ends what takes more of the processor, as soon as it is in Python; other work on the machine does not count."""

    def late(*_: object) -> None:
        raise AssertionError(f"it takes more than {count} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, count)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@cache
def folder() -> Path:
    """Files to read lie here; one process uses it at a time."""
    held = tempfile.TemporaryDirectory()
    FOLDERS.append(held)
    return Path(held.name)


FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def in_file(name: str, read_file: Callable[[Path], object]) -> Callable[[bytes], None]:
    """Runs a reader of files on bytes."""

    def run(data: bytes) -> None:
        file = folder() / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        read_file(file)

    return run


def text_of(read_text: Callable[[str], object]) -> Callable[[bytes], None]:
    return lambda data: read_text(data.decode(errors="replace")) and None


def documents(name: str) -> Callable[[bytes], None]:
    return in_file(name, lambda file: list(iter_documents(SourceConfig(name="x", path=str(file)))))


def prepared(name: str) -> Callable[[bytes], None]:
    return lambda data: read(folder(), data, name) and None


def chats(kind: Any) -> Callable[[bytes], None]:
    def run(file: Path) -> None:
        source = SourceConfig(name="x", path=str(file))
        for marked in marked_records(source, format_of(source, kind), tokenizer(), lambda _: None):
            assert len(marked.tokens) == len(marked.marks)

    return in_file("chat.jsonl", run)


def manifest(data: bytes) -> None:
    """A bundle is as it was written or something in it is named; nothing beside it is opened."""
    bundle = folder() / "bundle"
    if not bundle.exists():
        bundle.mkdir()
        (bundle / "a").write_bytes(b"arrays")
        (bundle / "b").write_bytes(b"tokens")
    (bundle / NAME).write_bytes(data)
    damage = find_damage(bundle)
    assert damage is None or "\n" not in damage


def manifest_seed() -> bytes:
    with tempfile.TemporaryDirectory() as held:
        for name, content in (("a", b"arrays"), ("b", b"tokens")):
            (Path(held) / name).write_bytes(content)
        write_manifest(Path(held))
        return (Path(held) / NAME).read_bytes()


@cache
def whole_cache() -> tuple[Path, bytes, list[list[int]]]:
    text = folder() / "cached.jsonl"
    text.write_bytes(samples.TEXTS)
    source = SourceConfig(name="x", path=str(text))
    with contextlib.redirect_stderr(io.StringIO()):
        found = open_or_build(source, tokenizer(), cache_directory(str(folder() / "cache")))
    return found.directory, (found.directory / "index.json").read_bytes(), in_cache(found)


def in_cache(cache: TokenCache) -> list[list[int]]:
    return [cache.document(number).tolist() for number in range(cache.num_documents)]


def cache_index(data: bytes) -> None:
    """A cache is made again, or its tokens are those of the text."""
    directory, index, tokens = whole_cache()
    (directory / "index.json").write_bytes(data)
    found, _ = token_cache._read_index(directory, json.loads(index)["key"], directory.parent)
    if found is not None:
        cache = TokenCache(directory, "x", found)
        assert in_cache(cache) == tokens
        assert len(cache.tokens) == cache.num_tokens
        assert (cache.fingerprint, cache.format, cache.marks) == (json.loads(index)["content"], "text", None)
        cache.check_unchanged()


def pieces(data: bytes) -> None:
    found = Tokenizer(data)
    ids = found.encode("the river 😀 fell\n\tslowly")
    found.decode(ids)
    for token in (0, 1, 2, found.vocab_size - 1, *ids):
        found.describe(token)


def release(name: str) -> Callable[[bytes], None]:
    """The files of a tokenizer beside the model's."""

    def run(file: Path) -> None:
        (file.parent / "tokenizer.model").write_bytes(tokenizer().model_bytes)
        read_tokenizer(file.parent, tokenizer().vocab_size + 2)
        file.unlink()

    return in_file(f"release-{name}/{name}", run)


def prints(data: bytes) -> None:
    """Fingerprints are made again, or are those of the text."""
    directory, _, _ = whole_cache()
    with contextlib.redirect_stderr(io.StringIO()):
        cache = open_or_build(
            SourceConfig(name="x", path=str(folder() / "cached.jsonl")), tokenizer(), directory.parent
        )
    (file,) = directory.parent.glob("fingerprints*.npz")
    file.write_bytes(data)
    found, made = fingerprints(cache, directory.parent), make_fingerprints(cache.tokens, cache.document_starts)
    assert all(np.array_equal(array, getattr(made, name)) for name, array in vars(found).items())


def prints_seed() -> bytes:
    directory, _, _ = whole_cache()
    cache = open_or_build(SourceConfig(name="x", path=str(folder() / "cached.jsonl")), tokenizer(), directory.parent)
    fingerprints(cache, directory.parent)
    (file,) = directory.parent.glob("fingerprints*.npz")
    return file.read_bytes()


def pickled(data: bytes) -> bytes:
    """An archive around a pickle, with the checksums that it needs."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/data/0", bytes(8))
        archive.writestr("model/data/1", bytes(24))
    return out.getvalue()


def torch_seed() -> bytes:
    file = folder() / "seed.pt"
    with TorchWriter(file, {"a": (2,), "b.c": (2, 3)}, "float32") as writer:
        writer.write("a", [np.zeros(2, np.uint32)])
        writer.write("b.c", [np.zeros(3, np.uint32)] * 2)
    return file.read_bytes()


def index_of_tensors(file: Path) -> None:
    tensors = file.parent / "model-00001-of-00001.safetensors"
    tensors.write_bytes(save({"a": np.zeros(2, np.float32)}))
    read_files(file.parent, [tensors])


def targets() -> Iterator[tuple[str, Target]]:
    yield (
        "config",
        Target(
            [TINY.encode(), to_yaml(parse_config(TINY)).encode()],
            text_of(lambda text: (parse_config(text, inherits=True), parse_config(text, saved=True))),
        ),
    )
    yield "overrides", Target([samples.OVERRIDES], text_of(lambda text: parse_config(TINY, text.splitlines())))
    yield "prepare-config", Target([samples.PREPARE], in_file("prepare.yaml", load_prepare_config))
    for end, pack in (("", bytes), (".gz", gzip.compress), (".zst", samples.zstd)):
        yield f"jsonl{end}", Target([pack(samples.TEXTS)], documents(f"a.jsonl{end}"))
        yield (
            f"prepare-jsonl{end}",
            Target([pack(samples.TEXTS), pack(samples.TEXTS.decode().encode("utf-16"))], prepared(f"p.jsonl{end}")),
        )
        yield (
            f"warc{end}",
            Target([pack(samples.WARC), *([pack(record(samples.PAGE)) * 2] if end else [])], prepared(f"w.warc{end}")),
        )
    yield "parquet", Target([samples.parquet({"text": ["the river", "é"]})], documents("a.parquet"))
    yield (
        "prepare-parquet",
        Target([samples.parquet({"text": ["the river", "é"], "url": ["u", "v"]})], prepared("p.parquet")),
    )
    yield "html", Target([samples.PAGE], prepared("p.html"))
    yield "chats", Target(samples.CHATS, chats("sft"))
    yield "judged", Target([lines(*PAIRS[:2]), lines(*LABELS[:2])], chats("preference"))
    yield "tokenizer", Target([tokenizer().model_bytes], pieces)
    for name, content in (
        ("added_tokens.json", {"<a>": 384, "<b>": 385}),
        ("tokenizer.json", {"added_tokens": samples.ADDED}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"384": samples.ADDED[0], "385": samples.ADDED[1]}}),
    ):
        yield name, Target([json.dumps(content).encode()], release(name))
    yield "config.json", Target([json.dumps(config_json(small())).encode()], in_file("config.json", read_description))
    yield "params.json", Target([json.dumps(params_json(small())).encode()], in_file("params.json", read_description))
    yield "safetensors", Target(samples.TENSORS, in_file("a.safetensors", read_safetensors))
    yield (
        "safetensors-index",
        Target(
            [json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()],
            in_file("index/model.safetensors.index.json", index_of_tensors),
        ),
    )
    yield "torch", Target([torch_seed()], in_file("a.pt", read_torch))
    with zipfile.ZipFile(io.BytesIO(torch_seed())) as archive:
        pickle = archive.read("seed/data.pkl")
    yield "torch-pickle", Target([pickle], lambda data: in_file("b.pt", read_torch)(pickled(data)))
    yield "manifest", Target([manifest_seed()], manifest)
    yield "cache-index", Target([whole_cache()[1]], cache_index)
    yield "fingerprints", Target([prints_seed()], prints)
    yield (
        "task",
        Target(
            [lines({"query": "?", "choices": ["a", "b"], "gold": 1}), lines({"text": "the river"})],
            in_file("task.jsonl", jsonl_task),
        ),
    )
    yield (
        "decontamination",
        Target(
            [lines({"text": "the river", "x": ["a", {"y": "b"}]})], in_file("d.jsonl", lambda file: list(_texts(file)))
        ),
    )
    yield (
        "decontamination.gz",
        Target([gzip.compress(lines({"text": "the river"}))], in_file("d.jsonl.gz", lambda file: list(_texts(file)))),
    )
    yield (
        "metrics",
        Target(
            [lines({"step": 1, "loss": 2.5, "expert_load": [[0.5, 0.5]]}, {"step": 2, "loss": None})],
            in_file("metrics.jsonl", lambda file: list(read_metrics(file))),
        ),
    )
    yield (
        "chat-requests",
        Target(
            [
                json.dumps(
                    {
                        "model": "tiny",
                        "messages": samples.MESSAGES,
                        "tools": samples.TOOLS,
                        "tool_choice": "auto",
                        "logprobs": True,
                        "top_logprobs": 2,
                        "stream": stream,
                        **samples.SAMPLING,
                    }
                ).encode()
                for stream in (False, True)
            ],
            body("chat/completions"),
        ),
    )
    yield (
        "completion-requests",
        Target(
            [
                json.dumps({"prompt": prompt, "logprobs": 2, "stream": stream, **samples.SAMPLING}).encode()
                for prompt, stream in (("the river", True), (["the", "river"], False), ([[5, 6], [7]], False))
            ],
            body("completions"),
        ),
    )


TARGETS = dict(targets())
