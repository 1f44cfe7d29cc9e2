"""Files as they come: compressed under any name, damaged, in odd encodings. What is good in them is kept."""

import bz2
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mixtral_jax.preparation.decompression import CHUNK
from tests.limits import mapping_at_most
from tests.preparation.pages import TEXTS, page, read, record

PAGES = [page(text) for text, _ in TEXTS.values()]
RECORDS = [record(text.encode(), number) for number, text in enumerate(PAGES)]
LINES = [f"line {number} {text}" for number, (text, _) in enumerate(TEXTS.values())] * 40
JSONL = "".join(json.dumps({"text": line}) + "\n" for line in LINES).encode()
zstd = zstandard.ZstdCompressor(write_checksum=True).compress


def texts(*args, **settings) -> tuple[list[str], list[str]]:
    found, problems = read(*args, **settings)
    return [doc["text"] for doc in found], problems


def dictionary_frame(packed: bytes) -> bytes:
    return b"\x5d\x2a\x4d\x18" + len(packed).to_bytes(4, "little") + packed


def warc_zst() -> bytes:
    """A file that begins with a dictionary, as archives that keep their records apart write it."""
    dictionary = zstandard.train_dictionary(1 << 12, RECORDS * 40)
    with_it = zstandard.ZstdCompressor(dict_data=dictionary)
    return dictionary_frame(zstd(dictionary.as_bytes())) + b"".join(map(with_it.compress, RECORDS))


ARCHIVES = {
    "plain": b"".join(RECORDS),
    "by the record": b"".join(map(gzip.compress, RECORDS)),
    "as a whole": gzip.compress(b"".join(RECORDS)),
    "padded": b"".join(map(gzip.compress, RECORDS)) + b"\0" * 1000,
    "zstd": b"".join(map(zstd, RECORDS)),
    "zstd with a dictionary": warc_zst(),
    "zstd with a frame to skip": b"\x50\x2a\x4d\x18\x03\0\0\0abc" + b"".join(map(zstd, RECORDS)),
}


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
@pytest.mark.parametrize("data", ARCHIVES.values(), ids=list(ARCHIVES))
def test_the_bytes_tell_how_a_file_is_compressed(tmp_path, data, name):
    assert texts(tmp_path, data, name) == (PAGES, [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_so_do_those_of_other_files(tmp_path, pack, name):
    assert texts(tmp_path, pack(JSONL), name) == (LINES, [])
    assert texts(tmp_path, pack(PAGES[0].encode()), name.replace("jsonl", "html")) == (PAGES[:1], [])
    assert texts(tmp_path, pack("\n".join(LINES).encode()), name.replace("jsonl", "txt"), lines=True) == (LINES, [])


def unpacks_to(size: int) -> bytes:
    """A few bytes that do."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return b"".join([*(compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)), compressor.flush()])


@pytest.mark.parametrize("frame", [b"\x5d\x2a\x4d\x18\xff\xff\xff\xff", dictionary_frame(unpacks_to(1 << 30))])
def test_a_dictionary_that_says_it_is_huge_takes_no_memory(tmp_path, frame):
    records = b"".join(map(zstd, RECORDS))
    texts(tmp_path, records, "a.warc.zst")  # what is imported counts
    with mapping_at_most(400 << 20):
        found, problems = texts(tmp_path, frame + records, "a.warc.zst")
    assert (found, problems[0]) == (PAGES, "bad zstd data")


JUNK = {
    "a bad version line": b"WARX/1.0\r\n" + RECORDS[0].partition(b"\r\n")[2],
    "a stray version line": b"WARC/x.y\r\n",
    "NULs": b"\0" * 500,
    "spaces": b" " * 500,
    "a line": b"\r\nnothing of the kind\r\n",
    "noise": bytes(range(256)) * 300,
    "more than is read at once": b"\1" * (CHUNK + 5),
}


@pytest.mark.parametrize("place", [0, 1, 6, len(RECORDS)])
@pytest.mark.parametrize("junk", JUNK.values(), ids=list(JUNK))
def test_damage_between_records_costs_no_record_and_is_counted(tmp_path, junk, place):
    data = b"".join(RECORDS[:place]) + junk + b"".join(RECORDS[place:])
    assert texts(tmp_path, data, "a.warc") == (PAGES, ["bad record"])


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (zstd, "zstd")])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.99])
def test_every_line_before_damage_is_kept(tmp_path, pack, name, share):
    long = b"".join(
        json.dumps({"text": f"{number} {hash(number * 7919)}"}).encode() + b"\n" for number in range(30_000)
    )
    wanted = [json.loads(line)["text"] for line in long.splitlines()]
    data = pack(long)
    found, problems = texts(tmp_path, data[: int(share * len(data))], "a.jsonl")
    assert problems == [f"truncated {name}"]
    assert found == wanted[: len(found)]
    assert len(found) > (share - 0.15) * len(wanted)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_what_follows_the_data_costs_none_of_it(tmp_path, name):
    data = JSONL if "json" in name else "\n".join(LINES).encode()
    settings = {"lines": True, "name": name}
    assert texts(tmp_path, gzip.compress(data) + b"garbage", **settings) == (LINES, ["bad gzip data"])
    assert texts(tmp_path, gzip.compress(data) + b"\0" * 100, **settings) == (LINES, [])
    half = len(data) // 2  # two members, as if two files had been joined; a line lies in both
    assert texts(tmp_path, gzip.compress(data[:half]) + gzip.compress(data[half:]), **settings) == (LINES, [])


def test_a_damaged_file_that_is_one_document_is_none(tmp_path):
    for data in (gzip.compress(PAGES[0].encode())[:-9], zstd(PAGES[0].encode())[:-9]):
        found, problems = texts(tmp_path, data, "a.html")
        assert (found, [problem.split()[0] for problem in problems]) == ([], ["truncated"])


def test_records_that_strict_readers_refuse(tmp_path):
    lines = [
        '{"text": "NaN", "score": NaN}',
        '{"text": "half \\ud800 a pair"}',
        '{"text": "pair \\ud83d\\ude00"}',
        '{"text": "big", "n": 123456789012345678901234567890}',
        "",
        "  ",
        '{"text": "last", "url": "\\udc00"}',
    ]
    wanted = ["NaN", "half \ufffd a pair", "pair \U0001f600", "big", "last"]
    data = "\n".join(lines)
    for encoded in (
        data.encode(),
        data.encode("utf-8-sig"),
        data.encode("utf-16"),
        data.replace("\n", "\r\n").encode(),
    ):
        found, problems = read(tmp_path, encoded, "a.jsonl")
        assert ([doc["text"] for doc in found], problems) == (wanted, [])
        assert found[-1]["url"] == "\ufffd"
    assert texts(tmp_path, b'{"text": 3}\n[1]\n{"text"\n' + b"[" * 9999, "a.jsonl") == ([], ["bad record"] * 4)


def test_lines_longer_than_the_limit_cost_themselves(tmp_path):
    lines = [b"first", b"x" * 1001, b"second", b"y" * (2 * CHUNK), b"third", b"z" * 1000, b"z" * 1001]
    found, problems = texts(tmp_path, b"\n".join(lines), "a.txt", limit=1000, lines=True)
    assert (found, problems) == (["first", "second", "third", "z" * 1000], ["too large"] * 3)


def test_text_in_other_encodings_and_what_is_no_text(tmp_path):
    french = TEXTS["fr"][0]
    for lines in (True, False):
        found, problems = read(tmp_path, french.encode("latin-1"), "a.txt", lines=lines)
        assert [(doc["text"], doc["encoding"]) for doc in found] == [(french, "guess")]
    assert texts(tmp_path, french.encode("utf-16"), "a.txt") == ([french], [])
    assert texts(tmp_path, b"text\0text" + bytes(range(256)), "a.txt") == ([], ["bad encoding"])
    assert texts(tmp_path, bz2.compress(b"text" * 99), "a.txt")[0] == []
    assert problems == []


def test_strings_of_a_table_that_are_not_utf8(tmp_path):
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 5, 0, 0, 0, 9, 0, 0, 0])),
                              pyarrow.py_buffer("caf\xe9 good".encode("latin-1"))],
    )  # fmt: skip
    table = pyarrow.table(
        {"text": pyarrow.chunked_array([bad, pyarrow.array([None, "fine"])]), "url": ["a", "b", None, "d"]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    found, problems = read(tmp_path, (tmp_path / "t.parquet").read_bytes(), "a.parquet")
    assert [(doc["text"], doc["url"]) for doc in found] == [("café ", "a"), ("good", "b"), ("fine", "d")]
    assert problems == ["bad record"]
