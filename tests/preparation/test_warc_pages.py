"""What HTTP and crawlers do to a page is undone: codings of content, chunks, types in any spelling."""

import gzip
import zlib

import brotli
import pytest
import zstandard

from tests.preparation.pages import TEXTS, archive, page, read

PAGES = [page(text) for text, _ in TEXTS.values()]
BODIES = [text.encode() for text in PAGES]


def headless(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def many_members(data: bytes) -> bytes:
    return gzip.compress(data[:100]) + gzip.compress(data[100:])


ENCODERS = {
    "gzip": gzip.compress, "X-GZIP": gzip.compress, "br": brotli.compress, "deflate": zlib.compress,
    "zstd": zstandard.ZstdCompressor().compress, "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}  # fmt: skip
ODD = [
    ("deflate", headless),
    ("gzip", many_members),
    ("br", gzip.compress),
    ("gzip", zstandard.ZstdCompressor().compress),
]


def texts(folder, data: bytes, **settings) -> tuple[list[str], list[str]]:
    found, problems = read(folder, data, **settings)
    return [doc["text"] for doc in found], problems


@pytest.mark.parametrize(("coding", "encode"), [*ENCODERS.items(), *ODD])
def test_codings_are_undone(tmp_path, coding, encode):
    assert texts(tmp_path, archive(*map(encode, BODIES), Content_Encoding=coding)) == (PAGES, [])


@pytest.mark.parametrize("coding", [*ENCODERS, "identity", "utf-8", "nonsense", ""])
def test_a_wrong_label_leaves_the_bytes(tmp_path, coding):
    assert texts(tmp_path, archive(*BODIES, Content_Encoding=coding)) == (PAGES, [])


@pytest.mark.parametrize("coding", ["br", "deflate"])
def test_a_wrong_label_of_bytes_that_could_be_so_coded_leaves_them_too(tmp_path, coding):
    body = BODIES[0].replace(b"<body>", b"<body>\x01", 1)
    assert texts(tmp_path, archive(body, Content_Encoding=coding)) == ([body.decode()], ["damaged content"])


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd"])
def test_of_a_body_that_was_cut_the_begin_is_kept_and_the_damage_counted(tmp_path, coding):
    long = page(" ".join(f"{number} {text}" for number in range(400) for text in PAGES)).encode()
    data = ENCODERS[coding](long)
    found, problems = texts(tmp_path, archive(data[: len(data) // 2], Content_Encoding=coding), limit=len(long))
    assert problems == ["damaged content"]
    assert page("").split("<p>")[0][:15] in found[0]
    assert long.decode().startswith(found[0])


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd"])
def test_a_body_that_unpacks_to_too_much_is_passed_over(tmp_path, coding):
    bomb = ENCODERS[coding](b"<html>" + b" " * (30 << 20))
    found, problems = texts(
        tmp_path, archive(ENCODERS[coding](BODIES[0]), bomb, ENCODERS[coding](BODIES[1]), Content_Encoding=coding)
    )
    assert (found, problems) == (PAGES[:2], ["too large"])


def test_chunks_are_joined(tmp_path):
    data = gzip.compress(BODIES[1])
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:50], data[50:])) + b"0\r\n\r\n"
    assert texts(tmp_path, archive(chunks, Transfer_Encoding="Chunked", Content_Encoding="gzip")) == ([PAGES[1]], [])
    assert texts(tmp_path, archive(BODIES[1], Transfer_Encoding="chunked")) == ([PAGES[1]], [])


@pytest.mark.parametrize(
    "payload", ["", "TEXT/HTML", "text/html; charset=utf-8", " text/html ", "Application/XHTML+xml"]
)
def test_types_are_taken_in_any_spelling(tmp_path, payload):
    assert texts(tmp_path, archive(*BODIES, payload=payload)) == (PAGES, [])


def test_other_types_are_passed_over_by_name(tmp_path):
    assert texts(tmp_path, archive(BODIES[0], payload="Application/PDF; x=1")) == ([], ["skipped: application/pdf"])
    assert texts(tmp_path, archive(b"%PDF-1.4 ...", content_type="x/y")) == ([], ["skipped: application/pdf"])
