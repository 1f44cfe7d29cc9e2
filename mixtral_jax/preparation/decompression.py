"""Compressed files, told by their first bytes and never by their names: gzip, zstd, or neither.

Each gzip member and zstd frame stands alone: what is damaged is reported, and the search goes on at the next one.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

CHUNK = 1 << 20
GZIP, ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
FORMAT = re.compile(rb"(?P<gzip>\x1f\x8b\x08)|(?P<zstd>\x28\xb5\x2f\xfd)|WARC/")
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # frames of zstd that hold no data
BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")  # bytes that text has none of (mimesniff.spec.whatwg.org)
DICTIONARY = 0x5D  # first byte of the one that begins a .warc.zst file (iipc.github.io/warc-specifications)
LARGEST_DICTIONARY = 1 << 26  # bytes; those in use have a few hundred thousand
PIECE = 1 << 12  # bytes that zstd decompresses at once: they may become a hundred megabytes

Stream = Any  # a binary file or what behaves like one
Report = Callable[[str, str], None]  # kind of the problem, detail


def iter_pieces(stream: Stream, report: Report) -> Iterator[bytes | None]:
    """Yields what a file holds, decompressed, in pieces.

    Args:
        stream: the file.
        report: is told what is damaged.

    Yields:
        Bytes; empty ones at the end of a gzip member, of a zstd frame, and of a file that is not compressed; None where
        one of them ends badly.
    """
    raw = stream.read(1 << 16)
    begin = FORMAT.match(raw)
    if not begin and BINARY.search(raw[:16]):  # no text, so that the begin may be damaged
        begin = FORMAT.search(raw)
    kind = begin.lastgroup if begin else None
    if kind == "gzip":
        yield from _members(stream, raw, GZIP, lambda: zlib.decompressobj(31), "gzip", report)
    elif kind == "zstd" or SKIPPABLE.match(raw):
        raw, dictionary = _dictionary(stream, raw, report)
        yield from _members(stream, raw, ZSTD, lambda: _Frame(dictionary), "zstd", report)
    else:
        while raw:
            yield raw
            raw = stream.read(CHUNK)
        yield b""


def _members(
    stream: Stream, raw: bytes, magic: bytes, decompressor: Callable[[], Any], name: str, report: Report
) -> Iterator[bytes | None]:
    ending: bytes | None = b""
    chunk = CHUNK if magic == GZIP else 1 << 16
    while raw:
        if len(raw) < len(magic):
            raw += stream.read(chunk)
        start = 0 if magic == ZSTD and SKIPPABLE.match(raw) else raw.find(magic)
        if start != 0:  # not where a member should begin
            if ending is not None and raw.strip(b"\0"):  # else the rest of what was reported already
                report(f"bad {name} data", "bytes between two members")
            while start < 0:
                tail, more = raw[1 - len(magic) :], stream.read(chunk)
                if not more:
                    return
                raw = tail + more
                start = raw.find(magic)
            raw = raw[start:]
        member = decompressor()
        pending, raw = raw, b""
        ending = b""
        try:
            while not member.eof:
                if piece := member.decompress(pending, CHUNK):
                    yield piece
                pending = member.unconsumed_tail or (b"" if member.eof else stream.read(chunk))
                if not pending and not member.eof and not piece:
                    report(f"truncated {name}", "the file ends within a member")
                    ending = None
                    break
            raw = member.unused_data
        except (zlib.error, zstandard.ZstdError) as error:
            report(f"bad {name} data", str(error))
            ending = None
            raw = pending[1:]  # look for the next member behind this one's begin
        yield ending
        raw = raw or stream.read(chunk)


class _Frame:
    """One frame of zstd behind the interface of zlib's decompressors, but without a limit for what comes out."""

    def __init__(self, dictionary: zstandard.ZstdCompressionDict | None):
        self._frame = zstandard.ZstdDecompressor(dict_data=dictionary).decompressobj()
        self.eof = False
        self.unconsumed_tail = self.unused_data = b""

    def decompress(self, data: bytes, _: int) -> bytes:
        out = self._frame.decompress(data[:PIECE])
        self.eof = self._frame.eof
        if self.eof:
            self.unconsumed_tail, self.unused_data = b"", self._frame.unused_data + data[PIECE:]
        else:
            self.unconsumed_tail = data[PIECE:]
        return out


def _dictionary(stream: Stream, raw: bytes, report: Report) -> tuple[bytes, zstandard.ZstdCompressionDict | None]:
    """What follows a file's first frame if that holds a dictionary, and the dictionary."""
    if raw[0] != DICTIONARY:
        return raw, None
    size = int.from_bytes(raw[4:8], "little")
    if size > LARGEST_DICTIONARY:
        report("bad zstd data", f"a dictionary of {size} bytes")
        return raw[8:], None
    raw += stream.read(max(0, 8 + size - len(raw)))
    content, rest = raw[8 : 8 + size], raw[8 + size :] or stream.read(1 << 16)
    if content.startswith(ZSTD):
        content = zstandard.ZstdDecompressor().stream_reader(content).read(LARGEST_DICTIONARY + 1)
        if len(content) > LARGEST_DICTIONARY:
            report("bad zstd data", f"a dictionary that unpacks to more than {LARGEST_DICTIONARY} bytes")
            return rest, None
    return rest, zstandard.ZstdCompressionDict(content)
