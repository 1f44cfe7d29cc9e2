"""Reads one input file of any kind into raw documents, past whatever is wrong in it.

datatrove's readers stop at, or silently skip, what they cannot read; these report it. What makes a page of a WARC
record is datatrove's own `process_record`.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import cchardet
import fsspec
import magic
import orjson
import pyarrow
from datatrove.pipeline.readers.warc import process_record
from warcio.archiveiterator import ArchiveIterator

from mixtral_jax.preparation.config import PrepareSource
from mixtral_jax.preparation.plan import ARCHIVES, PAGES, RECORDS, TABLES, InputFile, compression_of, file_kind
from mixtral_jax.preparation.warc_records import iter_records

# A document: `text`, `index` in its file, and what is known of `id`, `url`, `date`; `html` if it is to be extracted.
Raw = dict[str, Any]
Report = Callable[[str, object, object], None]  # kind of the problem, record, detail
PAYLOAD_TYPE = "WARC-Identified-Payload-Type"
Stream = Any  # a binary file or what behaves like one; GzipFile and warcio are too odd for IO[bytes]
FAULTS_OF_A_FILE = (FileNotFoundError, PermissionError, gzip.BadGzipFile)  # of a remote one, among the system's errors
HTML_TYPES = ("text/html", "application/xhtml+xml")


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
                documents = _archive(raw, file, limit, report)
            elif kind in TABLES:
                documents = _table(raw, source.text_field, limit, report)
            else:
                with _decompressed(raw, file) as stream:
                    if kind in RECORDS:
                        documents = _records(stream, source.text_field, limit, report)
                    elif kind in PAGES or not source.lines:
                        documents = _whole(stream, kind in PAGES, limit, report)
                    else:
                        documents = _lines(stream, limit, report)
                    yield from _watched(documents, raw, on_bytes)
                    return
            yield from _watched(documents, raw, on_bytes)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        if "://" in file.path and isinstance(error, OSError) and not isinstance(error, FAULTS_OF_A_FILE):
            raise
        report("unreadable file", "", f"{type(error).__name__}: {error}")


def _watched(documents: Iterator[Raw], raw: Stream, on_bytes: Callable[[int], None]) -> Iterator[Raw]:
    for document in documents:
        on_bytes(raw.tell())
        yield document


def _decompressed(raw: Stream, file: InputFile) -> Stream:
    compression = compression_of(file.name)
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if compression == "zstd":  # the zstandard package would take a truncated file for a whole one
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return io.BufferedReader(raw)


def _archive(raw: Stream, file: InputFile, limit: int, report: Report) -> Iterator[Raw]:
    number = 0
    records = iter_records(
        raw, compression_of(file.name) == "gzip", limit, lambda kind, detail: report(kind, f"after {number}", detail)
    )
    for blob in records:
        number += 1
        try:
            page = _page(blob, limit, number, report)
        except Exception as error:  # warcio and its HTTP parser raise what they like
            report("bad record", number, f"{type(error).__name__}: {error}")
            continue
        if page:
            yield page


def _page(blob: bytes, limit: int, number: int, report: Report) -> Raw | None:
    record = next(iter(ArchiveIterator(io.BytesIO(blob))), None)
    if record is None:
        report("bad record", number, "no WARC headers")
        return None
    if record.rec_type not in ("response", "conversion"):
        report(f"skipped: {record.rec_type} record", number, "")
        return None
    status = record.http_headers.get_statuscode() if record.http_headers else "200"
    if status != "200":
        report(f"skipped: HTTP status {status}", number, "")
        return None
    content = _bounded(record.content_stream(), limit)  # a small record may unpack to a huge page
    url = (record.rec_headers.get("WARC-Target-URI") or "").strip("<>")
    if len(content) > limit:
        report("too large", number, f"{url} unpacks to more than {limit} bytes")
        return None
    record.content_stream = lambda: io.BytesIO(content)
    stated = (record.http_headers.get_header("Content-Type") or "") if record.http_headers else ""
    if stated.partition(";")[0].strip().lower() in HTML_TYPES and not record.rec_headers.get(PAYLOAD_TYPE):
        record.rec_headers.add_header(PAYLOAD_TYPE, "text/html")  # else libmagic guesses, now and then wrongly
    page = process_record(record)
    if page is None:
        kind = record.rec_headers.get(PAYLOAD_TYPE) or magic.from_buffer(content[:2048], mime=True)
        if kind in HTML_TYPES:
            report("bad encoding", number, f"{url} is {kind} in no known encoding")
        else:
            report(f"skipped: {kind}", number, "")
        return None
    return {
        "text": page["text"],
        "index": number,
        "id": page["id"].strip("<>"),
        "url": url,
        "date": page["date"],
        "html": record.rec_type == "response",
    }


def _bounded(stream: Stream, limit: int) -> bytes:
    parts: list[bytes] = []
    left = limit + 1
    while left and (part := stream.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _records(stream: Stream, field: str, limit: int, report: Report) -> Iterator[Raw]:
    for number, line in _bounded_lines(stream, limit, report):
        if line.isspace():
            continue
        try:
            record = orjson.loads(line)
        except ValueError as error:
            report("bad record", f"line {number}", error)
            continue
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            report("bad record", f"line {number}", f"no text in a field '{field}'")
            continue
        metadata = record.get("metadata")
        url = record.get("url") or (metadata.get("url") if isinstance(metadata, dict) else "")
        yield {"text": text, "index": number, "url": url if isinstance(url, str) else ""}


def _table(raw: Stream, field: str, limit: int, report: Report) -> Iterator[Raw]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(raw) as table:
        columns = [name for name in (field, "url") if name in table.schema_arrow.names]
        if field not in columns:
            report("unreadable file", "", f"no column '{field}'")
            return
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                text, url = row[field], row.get("url")
                if not isinstance(text, str):
                    report("bad record", f"row {number}", f"no text in a column '{field}'")
                elif len(text) > limit:
                    report("too large", f"row {number}", f"more than {limit} characters")
                else:
                    yield {"text": text, "index": number, "url": url if isinstance(url, str) else ""}


def _lines(stream: Stream, limit: int, report: Report) -> Iterator[Raw]:
    for number, line in _bounded_lines(stream, limit, report):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            report("bad encoding", f"line {number}", error)
            continue
        if text:
            yield {"text": text, "index": number}


def _whole(stream: Stream, html: bool, limit: int, report: Report) -> Iterator[Raw]:
    data = _bounded(stream, limit)
    if len(data) > limit:
        report("too large", "", f"more than {limit} bytes")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = cchardet.detect(data)["encoding"] or "utf-8"
        try:
            text = data.decode(encoding)
        except (UnicodeDecodeError, LookupError) as error:
            report("bad encoding", "", error)
            return
    yield {"text": text, "index": 0, "html": html}


def _bounded_lines(stream: Stream, limit: int, report: Report) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) <= limit:
            yield number, line
            continue
        report("too large", f"line {number}", f"more than {limit} bytes")
        while line and not line.endswith(b"\n"):
            line = stream.readline(limit)
