"""Cuts a WARC or WET file into its records, whatever is wrong with some of them.

datatrove's and warcio's readers stop at the first bad record. Here each gzip member, and each record in it, stands
alone: what cannot be read is reported and the search goes on at the next mark that begins one.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

CHUNK = 1 << 20
MAGIC = b"\x1f\x8b\x08"
VERSION = b"WARC/"
MARK = re.compile(rb"(?:^|\n)(?=WARC/[01]\.\d+\r?\n)")
HEADERS = 1 << 16  # bytes that the headers of one record may take
LENGTH = re.compile(rb"^content-length:[ \t]*(\S*)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
OVERLAP = 16  # bytes of a mark that may lie in the chunk before

Stream = Any  # a binary file or what behaves like one
Report = Callable[[str, str], None]  # kind of the problem, detail


def iter_records(stream: Stream, gzipped: bool, limit: int, report: Report) -> Iterator[bytes]:
    """Yields the bytes of every whole record, headers included.

    Args:
        stream: the file.
        gzipped: whether it is compressed, by the record as it should be or as a whole.
        limit: bytes of the largest record that is read.
        report: is told what could not be read.

    Yields:
        One record.
    """
    splitter = _Splitter(limit, report)
    for piece in _gunzipped(stream, report) if gzipped else _plain(stream):
        if piece is None:
            splitter.discard()
        else:
            yield from splitter.feed(piece) if piece else splitter.end()


def _plain(stream: Stream) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        yield chunk
    yield b""


def _gunzipped(stream: Stream, report: Report) -> Iterator[bytes | None]:
    """Decompresses member after member; empty bytes mark the end of one, None one that ends badly."""
    raw = stream.read(CHUNK)
    ending: bytes | None = b""
    while raw:
        if len(raw) < len(MAGIC):
            raw += stream.read(CHUNK)
        start = raw.find(MAGIC)
        if start != 0:  # not where a member should begin
            if ending is not None and raw.strip(b"\0"):  # else the rest of what was reported already
                report("bad gzip data", "bytes between two members")
            while start < 0:
                tail, more = raw[-2:], stream.read(CHUNK)
                if not more:
                    return
                raw = tail + more
                start = raw.find(MAGIC)
            raw = raw[start:]
        member = zlib.decompressobj(31)
        pending, raw = raw, b""
        ending = b""
        try:
            while not member.eof:
                if piece := member.decompress(pending, CHUNK):
                    yield piece
                pending = member.unconsumed_tail or (b"" if member.eof else stream.read(CHUNK))
                if not pending and not member.eof and not piece:
                    report("truncated gzip", "the file ends within a member")
                    ending = None
                    break
            raw = member.unused_data
        except zlib.error as error:
            report("bad gzip data", str(error))
            ending = None
            raw = pending[1:]  # look for the next member behind this one's begin
        yield ending
        raw = raw or stream.read(CHUNK)


class _Splitter:
    """Finds the records in a stream of bytes that comes in pieces."""

    def __init__(self, limit: int, report: Report):
        self._limit = limit
        self._report = report
        self._buffer = b""
        self._lost = False  # looking for the next record's mark

    def feed(self, piece: bytes) -> Iterator[bytes]:
        self._buffer += piece
        yield from self._records(final=False)

    def end(self) -> Iterator[bytes]:
        yield from self._records(final=True)
        self.discard()

    def discard(self) -> None:
        self._buffer, self._lost = b"", False

    def _records(self, final: bool) -> Iterator[bytes]:
        while True:
            if self._lost and not self._find_mark():
                return
            self._buffer = self._buffer.lstrip(b"\r\n")
            if not self._buffer:
                return
            record = self._next(final)
            if record is None:
                return
            if record:
                yield record

    def _find_mark(self) -> bool:
        mark = MARK.search(self._buffer, 1)
        if mark is None:
            self._buffer = self._buffer[-OVERLAP:]
            return False
        self._buffer, self._lost = self._buffer[mark.end() :], False
        return True

    def _next(self, final: bool) -> bytes | None:
        """The record at the begin of the buffer; empty if there is none to read, None if more bytes are needed."""
        buffer = self._buffer
        headers = re.search(rb"\r?\n\r?\n", buffer[:HEADERS])
        if headers is None:
            if len(buffer) < HEADERS and not final:
                return None
            return self._lose("bad record", "it has no headers")
        if not buffer.startswith(VERSION):
            return self._lose("bad record", f"it begins with {buffer[:20]!r}")
        stated = LENGTH.search(buffer, 0, headers.end())
        if stated is None or not stated[1].isdigit():
            return self._lose("bad record length", f"Content-Length is {stated[1] if stated else None!r}")
        length = int(stated[1])
        if length > self._limit:
            return self._lose("too large", f"a record of {length} bytes")
        end = headers.end() + length
        if len(buffer) < end + OVERLAP and not final:
            return None
        rest = buffer[end : end + OVERLAP].lstrip(b"\r\n")
        if len(buffer) < end or not (rest.startswith(VERSION) or VERSION.startswith(rest)):
            found = f"{len(buffer) - headers.end()} bytes follow" if len(buffer) < end else "no record follows it"
            return self._lose("bad record length", f"Content-Length is {length}, but {found}")
        self._buffer = buffer[end:]
        return buffer[:end]

    def _lose(self, kind: str, detail: str) -> bytes:
        self._report(kind, detail)
        self._lost = True
        return b""
