"""A record of a WARC or WET file to a page: its type, its body as HTTP sent it, its text."""

import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli
import magic
from warcio.archiveiterator import ArchiveIterator
from warcio.bufferedreaders import ChunkedDataReader

from mixtral_jax.preparation.decoding import decode
from mixtral_jax.preparation.decompression import BINARY, GZIP, SKIPPABLE, ZSTD, Report, Stream, iter_pieces

STATED = ("Content-Type", "Transfer-Encoding", "Content-Encoding")
HTML_TYPES = ("text/html", "application/xhtml+xml")


def read_page(blob: bytes, number: int, limit: int, report: Report) -> dict[str, Any] | None:
    """Makes a page of a record.

    Args:
        blob: the whole record.
        number: of the record in its file.
        limit: bytes of the largest page.
        report: is told why there is none, or what is damaged in it.

    Returns:
        `text`, `encoding` (how it was found), `index`, `id`, `url`, `date` and whether it is `html`; None for a record
        that holds no page.
    """
    record = next(iter(ArchiveIterator(io.BytesIO(blob))), None)
    if record is None:
        report("bad record", "no WARC headers")
        return None
    headers, http = record.rec_headers, record.http_headers
    if record.rec_type not in ("response", "conversion"):
        report(f"skipped: {record.rec_type} record", "")
        return None
    status = http.get_statuscode() if http else "200"
    if status != "200":
        report(f"skipped: HTTP status {status}", "")
        return None
    url = (headers.get("WARC-Target-URI") or "").strip("<>")
    stated, transfer, coding = ((http.get_header(name) or "") if http else "" for name in STATED)
    content = body(record.raw_stream, transfer, coding, limit, report)
    if len(content) > limit:
        report("too large", f"{url} unpacks to more than {limit} bytes")
        return None
    kind = _plain(headers.get("WARC-Identified-Payload-Type"))
    if not kind and _plain(stated) in HTML_TYPES:
        kind = "text/html"  # libmagic guesses, now and then wrongly
    kind = kind or magic.from_buffer(content[:2048], mime=True)
    if kind not in HTML_TYPES and (record.rec_type, kind) != ("conversion", "text/plain"):
        report(f"skipped: {kind}", "")
        return None
    html = record.rec_type == "response"
    text, encoding = decode(content, stated, html)
    return {
        "text": text,
        "encoding": encoding,
        "index": number,
        "id": (headers.get("WARC-Record-ID") or "").strip("<>"),
        "url": url,
        "date": headers.get("WARC-Date") or "",
        "html": html,
    }


def body(stream: Stream, transfer: str, coding: str, limit: int, report: Report) -> bytes:
    """Reads the body of an answer and undoes what HTTP did to it.

    Args:
        stream: what follows the headers of HTTP.
        transfer: header Transfer-Encoding.
        coding: header Content-Encoding. A body that is not in this coding is taken as it is.
        limit: bytes of the largest page.
        report: is told if the coded data is damaged; the body is what could be read of it.

    Returns:
        The body, cut behind the first byte that is too much.
    """
    if transfer.strip().lower() == "chunked":
        stream = ChunkedDataReader(stream, decomp_type=None)
    data = b"".join(iter(lambda: stream.read(1 << 20), b""))
    for name in reversed(coding.lower().split(",")):
        decoder = DECODERS.get(name.strip())
        if decoder is None or not BINARY.search(data[:1024]):
            continue
        if data.startswith((GZIP, ZSTD)) or SKIPPABLE.match(data):  # whichever of them was stated
            decoder = _members
        found = b""
        try:
            for piece in decoder(data, limit, report):
                found += piece
                if len(found) > limit:
                    break
        except (zlib.error, brotli.error) as error:
            report("damaged content", f"{name.strip()}: {error}")
        data = found or data
    return data[: limit + 1]


def _members(data: bytes, _: int, report: Report) -> Iterator[bytes]:
    pieces = iter_pieces(io.BytesIO(data), lambda kind, detail: report("damaged content", f"{kind}: {detail}"))
    return (piece for piece in pieces if piece)


def _deflate(data: bytes, limit: int, report: Report) -> Iterator[bytes]:
    headless = (data[0] << 8 | data[1]) % 31 or data[0] & 15 != 8  # as some servers send it, without zlib's header
    stream = zlib.decompressobj(-zlib.MAX_WBITS if headless else zlib.MAX_WBITS)
    found = stream.decompress(data, limit + 1)
    yield found
    if not stream.eof and len(found) <= limit:
        report("damaged content", "truncated deflate")


def _brotli(data: bytes, limit: int, report: Report) -> Iterator[bytes]:
    stream = brotli.Decompressor()
    yield stream.process(data, output_buffer_limit=limit + 1)
    while not stream.can_accept_more_data():
        yield stream.process(b"", output_buffer_limit=limit + 1)
    if not stream.is_finished():
        report("damaged content", "truncated brotli")


DECODERS: dict[str, Callable[[bytes, int, Report], Iterator[bytes]]] = {
    "gzip": _members, "x-gzip": _members, "zstd": _members, "deflate": _deflate, "br": _brotli,
}  # fmt: skip


def _plain(content_type: str | None) -> str:
    """A media type without its parameters."""
    return (content_type or "").partition(";")[0].strip().lower()
