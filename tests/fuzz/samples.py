"""Valid input of every kind, and mistakes to plant in it."""

import gzip
import io
import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from safetensors.numpy import save

from tests.preparation.pages import record


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in objects)


def parquet(rows: dict[str, list[str]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(rows), out)
    return out.getvalue()


CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "the river"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "name": "f", "tool_call_id": "123456789"},
]
ANSWER = {"role": "assistant", "content": "a stone"}
SAMPLING = {"max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 5, "stop": ["a", "b"],
            "repetition_penalty": 1.1, "n": 2, "stream_options": {"include_usage": True}, "experts": True}  # fmt: skip
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a stone"}]  # fmt: skip
CHATS = [
    lines({"messages": [*MESSAGES, ANSWER], "tools": TOOLS}),
    lines({"conversations": SHAREGPT, "system": "s", "tools": json.dumps(TOOLS)}),
    lines({"instruction": "say", "input": "x", "output": "y"}, {"instruction": "say", "instances": [{"output": "y"}]}),
    lines({"prompt": "hello", "completion": "a stone"}),
]  # fmt: skip
TEXTS = lines(
    {"text": "the river é😀", "url": "http://a.example"}, {"text": "and\n a stone", "metadata": {"url": None}}
)
PAGE = "<html><head><meta charset=latin1><title>t</title></head><body><p>the river, é</p></body></html>".encode(
    "latin1"
)
WARC = record(PAGE) + record(gzip.compress(PAGE), 1, Content_Encoding="gzip") + record(
    b"5\r\n<p>a \r\n0\r\n\r\n", 2, Transfer_Encoding="chunked")  # fmt: skip
TENSORS = [save({"a": np.zeros(2, np.float32), "b.c": np.zeros((2, 3), np.float16)}, {"format": "pt"})]
PREPARE = b"output: out\ntokenizer: mixtral\nsources:\n- {name: a, path: b, language: en}\n- {name: c, path: d}\n"
OVERRIDES = b"""train.steps=5
model.rope_scaling.kind=linear
model.rope_scaling.factor=2.0
data.sources=[{name: a, path: b, weight: 0.5}, {name: c, path: d}]
run_dir=~/x
"""
ADDED = [{"id": 384, "content": "<a>", "lstrip": False}, {"id": 385, "content": "<b>", "special": True}]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


TOKENS = [
    *(
        b"null",
        b"true",
        b"NaN",
        b"-1",
        b"1e999",
        b"[]",
        b"{}",
        b'""',
        b'"\\ud800"',
        b"\\u0000",
        b"..",
        b"/",
        b"\r\n",
        b"\n",
    ),
    *(b",", b":", b"${x}", b"???", b"&a", b"*a", b"<<: ", b"!!python/object ", b"[" * 3000, b"\xed\xa0\x80"),
]


def mutated(seed: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Changes bytes in some places: flips, cuts, repeats, insertions, numbers at their bounds, parts of others."""
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(data) + 1)
        size = draw.choice((1, 1, 2, 4, 8, draw.randrange(1, 200)))
        other = draw.choice(others)
        begin = draw.randrange(len(other) + 1)
        match draw.randrange(8):
            case 0 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                del data[place : place + size]
            case 2:
                data[place:place] = data[place : place + size] * draw.choice((1, 2, 50))
            case 3:
                data[place:place] = draw.randbytes(size)
            case 4:
                data[place : place + size] = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"9", b"[", b"{")) * size
            case 5:
                data[place : place + size] = other[begin : begin + size]
            case 6:
                data[place:place] = draw.choice(TOKENS)
            case _:
                number = next((i for i in range(place, len(data)) if 48 <= data[i] < 58), None)
                if number is not None:
                    data[number : number + 1] = draw.choice((b"-1", b"0", b"1e999", b"9" * 19, b"9" * 5000, b"null"))
    return bytes(data)
