"""Reads one input file of any kind into raw documents, past whatever is wrong in it.

datatrove's readers stop at, or silently skip, what they cannot read; these report it.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow
import zstandard

from mixtral_jax.preparation.config import PrepareSource
from mixtral_jax.preparation.decoding import decode
from mixtral_jax.preparation.decompression import Stream, iter_pieces
from mixtral_jax.preparation.plan import ARCHIVES, PAGES, RECORDS, TABLES, InputFile, file_kind
from mixtral_jax.preparation.warc_pages import read_page
from mixtral_jax.preparation.warc_records import iter_records

# A document: `text`, how its `encoding` was found, `index` in its file, and what is known of `id`, `url`, `date`;
# `html` if it is to be extracted.
Raw = dict[str, Any]
Report = Callable[[str, object, object], None]  # kind of the problem, record, detail
FAULTS_OF_A_FILE = (FileNotFoundError, PermissionError)  # of a remote one, among the system's errors


def read_documents(
    file: InputFile, source: PrepareSource, limit: int, report: Report, on_bytes: Callable[[int], None]
) -> Iterator[Raw]:
    """Yields the documents of a file.

    Args:
        file: where it is.
        source: how to read it.
        limit: bytes of the largest document that is read.
        report: is told what could not be read; kinds that begin with "skipped" are no faults.
        on_bytes: is told how far the file, as it lies there, has been read.

    Yields:
        One document.

    Raises:
        OSError, and what fsspec's stores raise: the connection to a store failed. That is no fault of the file, so
            that the task fails and is done again by the next run.
    """
    kind = file_kind(file.name)
    if file.size == 0:
        report("empty file", "", "")
        return
    try:
        with fsspec.open(file.path, "rb") as raw:
            if kind in ARCHIVES:
                documents = _archive(raw, limit, report)
            elif kind in TABLES:
                documents = _table(raw, source.text_field, limit, report)
            elif kind in RECORDS:
                documents = _records(raw, source.text_field, limit, report)
            elif kind in PAGES or not source.lines:
                documents = _whole(raw, kind in PAGES, limit, report)
            else:
                documents = _documents(raw, limit, report)
            for document in documents:
                on_bytes(raw.tell())
                yield document
    except (OSError, UnicodeDecodeError, zstandard.ZstdError, pyarrow.ArrowException) as error:
        if "://" in file.path and isinstance(error, OSError) and not isinstance(error, FAULTS_OF_A_FILE):
            raise
        report("unreadable file", "", f"{type(error).__name__}: {error}")


def _archive(raw: Stream, limit: int, report: Report) -> Iterator[Raw]:
    number = 0

    def between(kind: str, detail: str) -> None:
        report(kind, f"after {number}", detail)

    def within(kind: str, detail: str) -> None:
        report(kind, number, detail)

    for blob in iter_records(raw, limit, between):
        number += 1
        try:
            page = read_page(blob, number, limit, within)
        except Exception as error:  # warcio and its HTTP parser raise what they like
            report("bad record", number, f"{type(error).__name__}: {error}")
            continue
        if page:
            yield page


def _records(raw: Stream, field: str, limit: int, report: Report) -> Iterator[Raw]:
    for number, line in _lines(raw, limit, report):
        decoded, encoding = decode(line)
        if not decoded.strip():
            continue
        try:
            record = json.loads(decoded)  # takes NaN and halves of surrogate pairs, which real files hold, too
        except (ValueError, RecursionError) as error:
            report("bad record", f"line {number}", error)
            continue
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            report("bad record", f"line {number}", f"no text in a field '{field}'")
            continue
        metadata = record.get("metadata")
        url = record.get("url") or (metadata.get("url") if isinstance(metadata, dict) else "")
        url = _mended(url) if isinstance(url, str) else ""
        yield {"text": _mended(text), "encoding": encoding, "index": number, "url": url}


def _mended(text: str) -> str:
    """Joins surrogates that are pairs and replaces the others, which no file can hold."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _table(raw: Stream, field: str, limit: int, report: Report) -> Iterator[Raw]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(raw) as table:
        columns = [name for name in (field, "url") if name in table.schema_arrow.names]
        if field not in columns:
            report("unreadable file", "", f"no column '{field}'")
            return
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            rows = zip(*(_values(batch.column(name)) for name in columns), strict=True)
            for row in rows:
                number += 1
                text, url = row[0], row[1] if len(row) > 1 else None
                if not isinstance(text, bytes):
                    report("bad record", f"row {number}", f"no text in a column '{field}'")
                elif len(text) > limit:
                    report("too large", f"row {number}", f"more than {limit} bytes")
                else:
                    text, encoding = decode(text)
                    url = decode(url)[0] if isinstance(url, bytes) else ""
                    yield {"text": text, "encoding": encoding, "index": number, "url": url}


def _values(column: pyarrow.Array) -> list[Any]:
    """Values of a column, strings as bytes: the format promises UTF-8, but writers do not always hold to it."""
    strings = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return (column.cast(pyarrow.large_binary()) if strings else column).to_pylist()


def _documents(raw: Stream, limit: int, report: Report) -> Iterator[Raw]:
    for number, line in _lines(raw, limit, report):
        text, encoding = decode(line)
        if text.strip():
            yield {"text": text.strip(), "encoding": encoding, "index": number}


def _whole(raw: Stream, html: bool, limit: int, report: Report) -> Iterator[Raw]:
    data = b""
    for piece in _pieces(raw, report):
        if piece is None:
            return
        data += piece
        if len(data) > limit:
            report("too large", "", f"more than {limit} bytes")
            return
    text, encoding = decode(data, html=html)
    if "\0" in text:
        report("bad encoding", "", "binary data")
        return
    yield {"text": text, "encoding": encoding, "index": 0, "html": html}


def _lines(raw: Stream, limit: int, report: Report) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of all lines, but of a damaged file only of those before the damage."""
    number, held, cut = 1, b"", False
    for piece in _as_utf8(_pieces(raw, report)):
        if piece is None:
            return
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            if cut or len(line) > limit:
                report("too large", f"line {number}", f"more than {limit} bytes")
            else:
                yield number, line
            number, cut = number + 1, False
        if len(held) > limit:
            held, cut = b"", True
    if cut:
        report("too large", f"line {number}", f"more than {limit} bytes")
    else:
        yield number, held


def _pieces(raw: Stream, report: Report) -> Iterator[bytes | None]:
    return iter_pieces(raw, lambda kind, detail: report(kind, "", detail))


def _as_utf8(pieces: Iterator[bytes | None]) -> Iterator[bytes | None]:
    """Pieces of a file in UTF-16, which its byte order mark tells, as UTF-8; others as they are."""
    decoder = None
    for number, piece in enumerate(pieces):
        if not number and piece and piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            decoder = codecs.getincrementaldecoder("utf-16")("replace")
        yield decoder.decode(piece).encode() if decoder and piece else piece
