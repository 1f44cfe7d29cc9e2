"""Cuts a WARC or WET file into its records, whatever is wrong with some of them.

datatrove's and warcio's readers stop at the first bad record. Here each one stands alone: what cannot be read is
reported and the search goes on at the next mark that begins one.
"""

import re
from collections.abc import Iterator

from mixtral_jax.preparation.decompression import Report, Stream, iter_pieces

VERSION = b"WARC/"
MARK = re.compile(rb"WARC/[01]\.\d+\r?\n(?=[A-Za-z])")
END = (b"\r\n\r\n", b"\n\n")  # of a record
HEADERS = 1 << 16  # bytes that the headers of one record may take
LENGTH = re.compile(rb"^content-length:[ \t]*(\S*)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
OVERLAP = 16  # bytes of a mark that may lie in the chunk before


def iter_records(stream: Stream, limit: int, report: Report) -> Iterator[bytes]:
    """Yields the bytes of every whole record, headers included.

    Args:
        stream: the file; if it is compressed, by the record as it should be or as a whole.
        limit: bytes of the largest record that is read.
        report: is told what could not be read.

    Yields:
        One record.
    """
    splitter = _Splitter(limit, report)
    for piece in iter_pieces(stream, report):
        if piece is None:
            splitter.discard()
        else:
            yield from splitter.feed(piece) if piece else splitter.end()


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
        self._buffer, self._lost = self._buffer[mark.start() :], False
        return True

    def _next(self, final: bool) -> bytes | None:
        """The record at the begin of the buffer; empty if there is none to read, None if more bytes are needed."""
        buffer = self._buffer
        headers = re.search(rb"\r?\n\r?\n", buffer[:HEADERS])
        if headers is None:
            if len(buffer) < HEADERS and not final:
                return None
            return self._lose("bad record", "it has no headers")
        if not buffer.startswith(VERSION) or MARK.search(buffer, 1, headers.end()):  # a stray line before a record
            return self._lose("bad record", f"it begins with {buffer[:20]!r}")
        stated = LENGTH.search(buffer, 0, headers.end())
        if stated is None or not re.fullmatch(rb"\d{1,18}", stated[1]):
            return self._lose("bad record length", f"Content-Length is {stated[1][:20] if stated else None!r}")
        length = int(stated[1])
        if length > self._limit:
            return self._lose("too large", f"a record of {length} bytes")
        end = headers.end() + length
        if len(buffer) < end + OVERLAP and not final:
            return None
        rest = buffer[end : end + OVERLAP]
        ends = rest.startswith(END) or VERSION.startswith(rest.lstrip(b"\r\n")[: len(VERSION)])
        if len(buffer) < end or not ends:  # else the length is right, and what follows may be damaged
            found = f"{len(buffer) - headers.end()} bytes follow" if len(buffer) < end else "no record follows it"
            return self._lose("bad record length", f"Content-Length is {length}, but {found}")
        self._buffer = buffer[end:]
        return buffer[:end]

    def _lose(self, kind: str, detail: str) -> bytes:
        self._report(kind, detail)
        self._lost = True
        return b""
