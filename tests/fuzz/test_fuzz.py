"""Damaged and hostile input of every kind is read or refused in one sentence."""

import json
import random
import struct

import pytest

from mixtral_jax.config import UserError
from tests.fuzz.samples import WARC, lines, mutated
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.drills
SLOW = ("config", "overrides", "prepare-config")  # to read
DEEP = b"[" * 5000  # more than Python's parsers go down


@pytest.mark.parametrize("name", TARGETS)
def test_changes_of_valid_input(name):
    """The same ones in every run; `python -m tests.fuzz` tries others."""
    target, draw = TARGETS[name], random.Random(name)
    assert all(map(target, target.seeds))
    for _ in range(15 if name in SLOW else 100):
        data = mutated(draw.choice(target.seeds), draw, target.seeds)
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} at {data!r:.2000}") from error


def seed(name: str) -> bytes:
    return TARGETS[name].seeds[0]


def in_directory(archive: bytes, place: int, value: int) -> bytes:
    """The archive with another byte so far behind the begin of the first entry of its directory."""
    changed = bytearray(archive)
    changed[archive.index(b"PK\x01\x02") + place] |= value
    return bytes(changed)


def listing(name: str) -> bytes:
    return json.dumps({name: {"bytes": 6, "sha256": "0"}}).encode()


def calling(arguments: bytes) -> bytes:
    called = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": arguments.decode()}}
    asked = {"role": "user", "content": "a"}
    result = {"role": "tool", "content": "2", "name": "f", "tool_call_id": "123456789"}
    return lines({"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [called]}, result, asked]})


FOUND = {
    "a manifest too deep": ("manifest", DEEP),
    "a manifest of a file elsewhere": ("manifest", listing("/dev/null")),
    "a manifest of too long a name": ("manifest", listing("a" * 5000)),
    "metrics too deep": ("metrics", b'{"step": ' + DEEP + b"\n"),
    "tokens the other way round": ("cache-index", seed("cache-index").replace(b"<u2", b">u2")),
    "fewer documents than there are": ("cache-index", seed("cache-index").replace(b'documents": 2', b'documents": 1')),
    "an index without a key": ("cache-index", seed("cache-index").replace(b"num_tokens", b"num_toKens")),
    "fingerprints that ask for a password": ("fingerprints", in_directory(seed("fingerprints"), 8, 1)),
    "a length of 5000 digits": ("warc", WARC.replace(b"Content-Length: ", b"Content-Length: " + b"9" * 5000)),
    "a dictionary of 4 GiB": ("warc.zst", b"\x5d\x2a\x4d\x18\xff\xff\xff\xff"),
    "a table that is not UTF-8": ("parquet", seed("parquet").replace("é".encode(), b"\xc3a")),
    "a complaint of two lines": ("parquet", seed("parquet")[:-30] + b"\xff" * 22 + seed("parquet")[-8:]),
    "a column that is not UTF-8": ("prepare-parquet", seed("prepare-parquet").replace(b"text", b"te\xd8t")),
    "tools too deep": ("chats", lines({"conversations": [], "tools": DEEP.decode()})),
    "tools of a pair": ("judged", lines({"prompt": "a", "chosen": "b", "rejected": "c", "tools": "{"})),
    "a piece that is not UTF-8": ("tokenizer", seed("tokenizer").replace("\u2581".encode(), b"\xe2\x96a", 1)),
    "half a character as a token": ("added_tokens.json", b'{"<a>": 384, "\\ud800": 385}'),
    "a key of two lines": ("params.json", b'{"a\\nb": 1}'),
    "an archive with a password": ("torch", in_directory(seed("torch"), 8, 1)),
    "an archive of a later kind": ("torch", in_directory(seed("torch"), 6, 64)),
    "a pickle that asks for 32 GB": ("torch-pickle", b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b"."),
    "a pickle that asks for a terabyte": ("torch-pickle", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."),
    "more strides than axes": ("torch-pickle", seed("torch-pickle").replace(b"t\x89", b"J\1\0\0\0t\x89", 1)),
    "an evaluation set too deep": ("decontamination", DEEP),
    "an evaluation set that is damaged": ("decontamination.gz", seed("decontamination.gz")[:10] + b"\xff" * 9),
    "a task too deep": ("task", DEEP),
    "a model that is half a character": (
        "chat-requests",
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
    ),
    "a parameter that is half a character": ("completion-requests", b'{"prompt": "a", "\\ud800": 1}'),
    "a call with arguments too deep": ("chat-requests", calling(DEEP)),
    "a record of a call with arguments too deep": ("chats", calling(DEEP)),
}


@pytest.mark.parametrize(("name", "data"), FOUND.values(), ids=list(FOUND))
def test_what_was_found(name, data):
    assert data not in TARGETS[name].seeds
    TARGETS[name](data)


def test_a_sentence_is_one_line_whatever_names_it_holds():
    assert str(UserError("é \x1b[31m\n 文")) == "é \\x1b[31m\\n 文"
