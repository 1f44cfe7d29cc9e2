"""Reads a source of text: its documents, one string each, in a fixed order."""

import contextlib
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.files import Listing, identity, list_files
from mixtral_jax.data.python_corpus import python_documents, python_files

PLAIN, RECORDS, TABLES = (".txt", ".md"), (".jsonl", ".json"), (".parquet",)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = TABLES + tuple(base + end for base in PLAIN + RECORDS for end in ("", *COMPRESSIONS))
LONGEST = 1 << 31  # bytes of one document, and of a line that holds one: a small file may unpack to any number
HUB_TIMEOUT = 10.0  # seconds that the hub may take to say whether it knows a name

log = logging.getLogger(__name__)
Records = Iterator[tuple[str, Mapping[str, Any]]]  # where each stands, for people, and what it holds


def _ignore(_: int) -> None:
    """Takes progress that nobody shows."""


def iter_documents(source: SourceConfig, on_bytes: Callable[[int], None] = _ignore) -> Iterator[str]:
    """Yields the documents of a source, always in the same order; white space alone is no document.

    Args:
        source: where the text lies; a text file is one document, a record (JSON line, parquet row) is one document.
        on_bytes: is told how many bytes of the source's files were consumed since it was last called.

    Yields:
        The text of one document, as it stands in the file.

    Raises:
        UserError: missing or unreadable file, malformed record (named by file and line), missing field, no text at all.
    """
    empty = True
    for part in document_parts(source, on_bytes):
        for text in part:
            if text.strip():
                empty = False
                yield text
    if empty:
        raise no_text(source)


def no_text(source: SourceConfig) -> UserError:
    """Makes the sentence about a source whose files hold nothing."""
    place = source.path or source.hub or f"builtin {source.builtin}"
    return UserError(f"source '{source.name}' ({place}) holds no text: name files that do")


def document_parts(source: SourceConfig, on_bytes: Callable[[int], None] = _ignore) -> Iterator[Iterator[str]]:
    """Yields, for each file of a source, an iterator over its documents; other sources are one part."""
    if source.builtin:
        yield python_documents(on_bytes)
    elif source.hub:
        remedy = f"set text_field of source '{source.name}'"
        yield _texts(_hub_records(source), source.text_field, f"'{source.hub}'", remedy)
    else:
        for file in source_files(source):
            yield _file_documents(file, source.text_field, on_bytes)


def find_sources(sources: Sequence[SourceConfig]) -> list[list[Path]]:
    """Lists the files of every source, and asks no hub: what is cheap to check, before anything is imported for it.

    Raises:
        UserError: no source at all, or one whose files are missing.
    """
    if not sources:
        raise UserError("data.sources is empty: name at least one source of text")
    return [[_prepared_index(source)] if source.prepared else source_files(source) for source in sources]


def iter_records(source: SourceConfig, on_bytes: Callable[[int], None] = _ignore) -> Records:
    """Yields the records of a source whole: JSON lines, a JSON list, rows of parquet; see `iter_documents`.

    Raises:
        UserError: as there, or the source holds plain text.
    """
    if source.builtin or source.prepared:
        raise UserError(f"source '{source.name}' holds texts, not records of chats: give a path or a hub's name")
    if source.hub:
        yield from _hub_records(source)
        return
    for file in source_files(source):
        if not (kind := _kind(file.name)) or kind in PLAIN:
            raise UserError(f"{file} holds plain text, not records of chats: name jsonl, json or parquet files")
        yield from _table_records(file, None, on_bytes) if kind in TABLES else _json_records(file, on_bytes, lists=True)


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Finds what is missing before anything slow; says what is left out and what comes in twice.

    Raises:
        UserError: no source at all, one whose files are missing, or a hub that cannot be reached.
    """
    first: dict[tuple[int, int], str] = {}  # which source has a file
    for source, files in zip(sources, find_sources(sources), strict=True):
        if source.hub:
            _check_hub(source)
        elif source.path and (left_out := _listing(source).say()):
            log.warning("source '%s': %d files; left out: %s", source.name, len(files), left_out)
        others = [first.setdefault(identity(file), source.name) for file in files]
        for other in dict.fromkeys(others):
            if other != source.name:
                log.warning(
                    "sources '%s' and '%s' share %d files: their text counts in both, for training or held out",
                    other, source.name, others.count(other),
                )  # fmt: skip


def _prepared_index(source: SourceConfig) -> Path:
    file = Path(source.prepared or "").expanduser() / "index.json"
    if not file.is_file():
        raise UserError(
            f"source '{source.name}' of data.sources: {source.prepared} holds no prepared tokens: name a "
            "directory tokens/LANGUAGE that `python -m mixtral_jax prepare` wrote"
        )
    return file


def source_files(source: SourceConfig) -> list[Path]:
    """Lists the files of a source in the order in which they are read; a hub's source has none here.

    Raises:
        UserError: nothing there, or a file of a kind that cannot be read.
    """
    if source.prepared:
        raise UserError(
            f"source '{source.name}' of data.sources holds prepared tokens, no text: to train a tokenizer name the "
            "preparation's documents with path"
        )
    if source.hub:
        return []
    if source.builtin:
        return python_files()
    where = f"source '{source.name}' of data.sources"
    listing = _listing(source)
    if not listing.files and listing.left_out["empty"]:
        raise no_text(source)
    if not listing.files and Path(source.path or "").expanduser().is_dir():
        raise UserError(f"{where}: the directory {listing.root} holds no file that ends in {_list(SUFFIXES)}")
    if not listing.files:
        raise UserError(f"{where}: nothing matches the path {source.path}: name a file, a directory or a glob")
    for file in listing.files:
        if not _kind(file.name):
            raise UserError(f"{where}: cannot read files such as {file}: the name must end in {_list(SUFFIXES)}")
    return listing.files


def _listing(source: SourceConfig) -> Listing:
    try:
        return list_files(source.path or "", _kind, empty=False)
    except OSError as error:
        raise UserError(
            f"source '{source.name}' of data.sources: cannot list {error.filename}: {error.strerror}; fix that or "
            "name other files"
        ) from None


def source_fingerprint(source: SourceConfig) -> str:
    """Digests what decides the documents of a source, without reading them.

    Files count by path, size and time of modification: a corpus of terabytes is checked in no time, and the worst that
    a touched or moved file costs is one more tokenization. What a run was trained on is told by the content hash in the
    token cache instead. A hub's source counts by name, for nothing else can be known offline.
    """
    files: list[tuple[str, int, int]] = []
    for file in source_files(source):
        stat = file.stat()
        files.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
    facts = [source.builtin, source.hub, None if source.builtin else source.text_field, files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def total_bytes(source: SourceConfig) -> int | None:
    """Adds up the sizes of a source's files in bytes; None where there are none to add up."""
    return None if source.hub else sum(file.stat().st_size for file in source_files(source))


def _list(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _kind(name: str) -> str | None:
    """Suffix of a file's name that tells the format, without that of the compression; None: unknown."""
    name = name.lower()
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    for end in COMPRESSIONS:
        suffix = suffix.removesuffix(end) if suffix else None
    return suffix


def _file_documents(file: Path, field: str, on_bytes: Callable[[int], None]) -> Iterator[str]:
    kind = _kind(file.name)
    if kind in TABLES + RECORDS:
        records = _table_records(file, field, on_bytes) if kind in TABLES else _json_records(file, on_bytes)
        yield from _texts(records, field)
    else:
        with _opened(file) as (raw, stream):
            yield _decode(_read(stream), str(file))
            on_bytes(raw.tell())


def _texts(records: Records, field: str, place: str = "", remedy: str = "set text_field") -> Iterator[str]:
    """What a field of records holds; an error without a `place` names that of the record."""
    for where, record in records:
        if field not in record:
            raise UserError(f"{place or where} has no field '{field}' (it has {', '.join(record) or 'none'}): {remedy}")
        yield _checked(record[field], field, where)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Opens a file as it is and as it reads without its compression; names it in the system's complaints."""
    try:
        with open(file, "rb") as raw, _decompressed(raw, file) as stream:
            yield raw, stream
    except OSError as error:  # missing, forbidden, truncated, not really compressed
        raise UserError(f"cannot read {file}: {error.strerror or error}; fix or leave out the file") from None


def _decompressed(raw: IO[bytes], file: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return contextlib.nullcontext(raw)
    # pyarrow's reader notices a truncated stream; that of the zstandard package does not.
    from pyarrow import CompressedInputStream

    return io.BufferedReader(CompressedInputStream(raw, compression), 1 << 20)  # type: ignore[arg-type]


def _json_records(file: Path, on_bytes: Callable[[int], None], *, lists: bool = False) -> Records:
    """One object a line or, if the file begins like one and such are allowed, a list of objects."""
    with _opened(file) as (raw, stream):
        told = 0
        if lists and stream.peek(1 << 10).lstrip()[:1] == b"[":  # type: ignore[attr-defined]  # both kinds have it
            items = _parsed(_read(stream), f"{file}", "write a whole list of objects")
            lines = ((f"{file}, record {number}", item) for number, item in enumerate(items, start=1))
        else:
            lines = (
                (where, _parsed(line, where, "write one whole object a line"))
                for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), start=1)
                if not line.isspace()
                for where in (f"{file}, line {number}",)
            )
        for where, record in lines:
            if not isinstance(record, dict):
                raise UserError(f"{where} holds a JSON {type(record).__name__}: every line must hold one object")
            yield where, record
            position = raw.tell()
            on_bytes(position - told)
            told = position


def _parsed(data: bytes | bytearray, where: str, remedy: str) -> Any:
    try:
        return json.loads(_decode(data, where))
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", "cannot be parsed")
        raise UserError(f"{where} is not a JSON record ({problem}): {remedy}") from None


def _table_records(file: Path, field: str | None, on_bytes: Callable[[int], None]) -> Records:
    """Rows of a table: of one column, or all of it."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            if field and field not in table.schema_arrow.names:
                raise UserError(f"{file} has no column '{field}': set text_field to one that holds text")
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=[field] if field else None):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
        on_bytes(file.stat().st_size)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        problem = (getattr(error, "strerror", None) or str(error)).splitlines()[0].rstrip(".")
        raise UserError(f"cannot read {file}: {problem}; fix or leave out the file") from None


def _read(stream: IO[bytes]) -> bytearray:
    """Reads a file to its end, or to where it is too long; asked for so much at once, Python takes the memory first."""
    data = bytearray()
    while len(data) <= LONGEST and (piece := stream.read(1 << 20)):
        data += piece
    return data


def _decode(data: bytes | bytearray, where: str) -> str:
    if len(data) > LONGEST:
        raise UserError(f"{where} holds more than {LONGEST >> 20:,} MiB in one piece: split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): convert the file to UTF-8") from None


def _checked(value: Any, field: str, where: str) -> str:
    if value is None:
        raise UserError(f"{where}: the field '{field}' is null: leave the record out, or give it a text, be it empty")
    if not isinstance(value, str):
        raise UserError(f"{where}: the field '{field}' holds {type(value).__name__}, not text: set text_field")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: the field '{field}' holds half of a surrogate pair: fix the text") from None
    return value


def _hub_name(source: SourceConfig) -> tuple[str, str | None, str]:
    """Repository, configuration and split out of "name" or "name:config:split"."""
    parts = (source.hub or "").split(":")
    if len(parts) > 3 or not parts[0]:
        raise UserError(f"source '{source.name}': hub '{source.hub}' is not written as name or name:config:split")
    repository, config, split = parts + [""] * (3 - len(parts))
    return repository, config or None, split or "train"


def _hub_trouble(source: SourceConfig, error: Exception) -> UserError:
    problem = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(
        f"source '{source.name}': cannot read '{source.hub}' from the data hub ({problem}): check the name and the "
        "network, or download the files and give their path"
    )


def _check_hub(source: SourceConfig) -> None:
    from huggingface_hub import HfApi

    repository, _, _ = _hub_name(source)
    try:
        HfApi().dataset_info(repository, timeout=HUB_TIMEOUT)
    except Exception as error:  # every cause, from no network to no such name, leaves the user the same choice
        raise _hub_trouble(source, error) from None


def _hub_records(source: SourceConfig) -> Records:
    import datasets

    _check_hub(source)  # the library itself tries for half a minute before it gives up
    repository, config, split = _hub_name(source)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            rows = datasets.load_dataset(repository, config, split=split, streaming=True, cache_dir=scratch)
            for number, record in enumerate(rows):
                yield f"'{source.hub}', record {number}", record
        except Exception as error:
            raise _hub_trouble(source, error) from None
