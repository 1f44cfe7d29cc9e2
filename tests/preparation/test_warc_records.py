"""One bad record costs that record, never another."""

import gzip
import io

import pytest

from mixtral_jax.preparation.warc_records import iter_records
from tests.preparation.inputs import html, warc_members

LIMIT = 1 << 20
PAGES = [(f"http://example.com/{n}", html(f"Page number {n} " * (50 + 400 * (n % 3)))) for n in range(9)]


def read(data: bytes, limit: int = LIMIT) -> tuple[set[int], list[str]]:
    """Numbers of the pages that were found, and the kinds of problems."""
    problems: list[str] = []
    found = set()
    for record in iter_records(io.BytesIO(data), limit, lambda kind, _: problems.append(kind)):
        found |= {n for n in range(len(PAGES)) if f"http://example.com/{n}\r\n".encode() in record}
    return found, problems


def spoil_length(member: bytes, gzipped: bool, value: bytes) -> bytes:
    import re

    plain = gzip.decompress(member) if gzipped else member
    plain = re.sub(rb"Content-Length: \d+", b"Content-Length: " + value, plain, count=1)
    return gzip.compress(plain) if gzipped else plain


@pytest.mark.parametrize("gzipped", [True, False])
def test_reads_every_record_of_a_good_file(gzipped):
    data = b"".join(warc_members(PAGES, gzipped=gzipped))
    assert read(data) == (set(range(9)), [])


def test_reads_a_file_compressed_as_a_whole():
    data = gzip.compress(b"".join(warc_members(PAGES, gzipped=False)))
    assert read(data) == (set(range(9)), [])


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("value", [b"7", b"99999", b"999999999999", b"-3", b"many", b""])
@pytest.mark.parametrize("place", [0, 4, 8])
def test_a_bad_length_costs_one_record(gzipped, value, place):
    members = warc_members(PAGES, gzipped=gzipped)
    members[place] = spoil_length(members[place], gzipped, value)
    found, problems = read(b"".join(members))
    assert found == set(range(9)) - {place}
    assert len(problems) == 1


@pytest.mark.parametrize("place", [0, 4, 8])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.99, 1.0])
def test_a_flipped_byte_costs_one_record(place, where):
    members = warc_members(PAGES)
    spoilt = bytearray(members[place])
    spoilt[int(where * (len(spoilt) - 1))] ^= 0x55
    members[place] = bytes(spoilt)
    found, problems = read(b"".join(members))
    assert found >= set(range(9)) - {place}
    assert place not in found
    assert problems == ["bad gzip data"]


@pytest.mark.parametrize("missing", [1, 20, 200])
def test_a_truncated_file_gives_all_but_the_last(missing):
    found, problems = read(b"".join(warc_members(PAGES))[:-missing])
    assert found == set(range(8))
    assert problems == ["truncated gzip"]


def test_junk_between_members_is_passed_over():
    members = warc_members(PAGES)
    found, problems = read(members[0] + b"junk" * 1000 + b"".join(members[1:]))
    assert found == set(range(9))
    assert problems == ["bad gzip data"]


@pytest.mark.parametrize("gzipped", [True, False])
def test_a_gigantic_record_is_passed_over(gzipped):
    pages = [*PAGES[:4], ("http://example.com/big", html("x" * (5 << 20))), *PAGES[4:]]
    found, problems = read(b"".join(warc_members(pages, gzipped=gzipped)))
    assert found == set(range(9))
    assert problems == ["too large"]


def test_a_record_whose_checksum_is_wrong_is_not_read():
    pages = [PAGES[0], (PAGES[1][0], html("y" * (3 << 20))), PAGES[2]]  # longer than what is decompressed at once
    members = warc_members(pages)
    members[1] = members[1][:-1] + bytes([members[1][-1] ^ 1])
    assert read(b"".join(members), limit=8 << 20) == ({0, 2}, ["bad gzip data"])
