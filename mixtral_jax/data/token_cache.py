"""Token cache: one source, tokenized once, as memory-mapped files with document boundaries.

A cache is a directory: `tokens` (BOS, text, EOS of one document after the other), `document_starts` (num_documents + 1
places in `tokens`), `document_bytes` (UTF-8 bytes of each document's text), all little-endian, and `index.json`. Where
the documents are records of chats there are also `marks`, a byte for each token (see `answers`), and bytes are those of
the answers.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer, UInt8
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.console import make_console
from mixtral_jax.data.answers import Kind, Piece, format_of
from mixtral_jax.data.cache_files import altered_file, building, locked
from mixtral_jax.data.sources import iter_documents, source_fingerprint, total_bytes
from mixtral_jax.data.tokenizer import Tokenizer

FORMAT = 1  # raise it when the files, or what the sources yield, change
BATCH = 1 << 22  # characters that are encoded at once

log = logging.getLogger(__name__)


class TokenCache:
    """The tokens of one source; see the head of the file."""

    def __init__(self, directory: Path, name: str, index: dict[str, Any]):
        """Maps the files of a cache whose `index` was checked."""
        self.directory = directory
        self.name = name
        self.num_documents: int = index["num_documents"]
        self.num_tokens: int = index["num_tokens"]
        self.fingerprint: str = index["content"]  # of the tokens and boundaries themselves
        self.format: str = index.get("format", "text")
        self.tokens: Integer[np.ndarray, tokens] = np.memmap(directory / "tokens", index["dtype"], "r")
        self.document_starts: Int64[np.ndarray, documents + 1] = np.memmap(directory / "document_starts", "<i8", "r")
        self.document_bytes: Int64[np.ndarray, documents] = np.memmap(directory / "document_bytes", "<i8", "r")
        marked = self.format != "text"
        self.marks: UInt8[np.ndarray, tokens] | None = np.memmap(directory / "marks", "u1", "r") if marked else None
        self._status = {directory / file: _status(directory / file) for file in index["sizes"]}

    def check_unchanged(self) -> None:
        """Raises `UserError` if a mapped file was written to since: the system ends who reads past its new end.

        One that was removed or replaced is still there for whoever has mapped it.
        """
        for file, before in self._status.items():
            with contextlib.suppress(FileNotFoundError):
                if (now := _status(file)) != before and now[0] == before[0]:
                    raise UserError(
                        f"{file} of source '{self.name}' was changed while the run reads it: leave the cache alone and "
                        "start the same command again, it is checked and made anew"
                    )

    def document(self, index: int) -> Integer[np.ndarray, "_"]:
        """The tokens of a document, BOS and EOS included, as they lie on the disk."""
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]]


def _status(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def open_or_build(source: SourceConfig, tokenizer: Tokenizer, cache_dir: Path, kind: Kind = "pretrain") -> TokenCache:
    """Opens the token cache of a source, building it first where there is none that is whole and up to date.

    The cache's name is a digest of the source, the tokenizer and the format, so a changed file or tokenizer gets a new
    one; `index.json` holds sizes and digests, so a truncated or altered one is seen and built again. Digests are
    compared when a cache is first opened where it lies. One process builds, others wait.

    Args:
        source: the text.
        tokenizer: turns it into tokens.
        cache_dir: the directory of caches; it exists.
        kind: what the source holds, as `objective.name` says.

    Returns:
        The open cache.

    Raises:
        UserError: trouble in the source (see `iter_documents`), or no room for the cache.
    """
    if source.prepared and kind == "pretrain":
        return _open_prepared(source, source.prepared, tokenizer, cache_dir)
    format = "text" if kind == "pretrain" else format_of(source, kind)
    key = _key(source, tokenizer, format)
    target = cache_dir / f"tokens-{key[:24]}"
    with locked(target):
        index, problem = _read_index(target, key, cache_dir)
        if problem:
            log.warning("the token cache %s is damaged (%s): building it again", target, problem)
        if index is None:
            with building(target) as directory:
                _build(source, tokenizer, directory, key, format)
            if _key(source, tokenizer, format) != key:
                raise UserError(f"the files of source '{source.name}' changed while they were read: start again")
            index, problem = _read_index(target, key, cache_dir)
            if index is None:
                raise UserError(f"the token cache {target} cannot be read back ({problem}): check the disk")
    return TokenCache(target, source.name, index)


def _open_prepared(source: SourceConfig, prepared: str, tokenizer: Tokenizer, stamps: Path) -> TokenCache:
    directory = Path(prepared).expanduser()
    index, problem = _read_index(directory, prepared_key(tokenizer), stamps)
    if index is None:
        raise UserError(
            f"source '{source.name}': cannot use the prepared tokens {directory} ({problem or 'not there'}): prepare "
            "them with data.tokenizer, or set data.tokenizer to the tokenizer.model of the preparation"
        )
    return TokenCache(directory, source.name, index)


def prepared_key(tokenizer: Tokenizer) -> str:
    """Key of a cache that is named by its place, wherever that moves, not by the files it was made of."""
    return hashlib.sha256(f"{FORMAT} prepared {tokenizer.fingerprint}".encode()).hexdigest()


def token_dtype(tokenizer: Tokenizer) -> str:
    """Type of the integers in a tokenizer's caches."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def _key(source: SourceConfig, tokenizer: Tokenizer, format: str) -> str:
    read = "" if format == "text" else f" {format}"
    return hashlib.sha256(f"{FORMAT} {source_fingerprint(source)} {tokenizer.fingerprint}{read}".encode()).hexdigest()


def _read_index(directory: Path, key: str, stamps: Path) -> tuple[dict[str, Any] | None, str]:
    """The index of a whole cache, or None and what is wrong with it (nothing, if there is no cache)."""
    if not directory.exists():
        return None, ""
    try:
        index = json.loads((directory / "index.json").read_text())
        if index["key"] != key:
            return None, "it belongs to other text or another tokenizer"
        for name, size in index["sizes"].items():
            if (found := (directory / name).stat().st_size) != size:
                return None, f"{name} has {found} bytes instead of {size}"
        if altered := altered_file(directory, index["sha256"], stamps):
            return None, f"{altered} is not what was written"
        if not _agrees(index):
            return None, "its index contradicts itself"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return index, ""


def _agrees(index: dict[str, Any]) -> bool:
    """Whether the index, which nothing has a checksum of, says of the files what follows from their sizes."""
    sizes, tokens, documents = index["sizes"], index["num_tokens"], index["num_documents"]
    expected = {
        "tokens": tokens * np.dtype(index["dtype"]).itemsize,
        "document_starts": 8 * (documents + 1),
        "document_bytes": 8 * documents,
        **({} if index.get("format", "text") == "text" else {"marks": tokens}),
    }
    return bool(sizes == expected and index["content"] == _content(index["dtype"], index["sha256"]))


def encode_documents(tokenizer: Tokenizer, texts: list[str], threads: int = 0) -> Piece:
    """Encodes texts, each between BOS and EOS; see `Tokenizer.encode_batch`."""
    encoded = tokenizer.encode_batch(texts, threads)
    parts = [part for ids in encoded for part in ([tokenizer.bos_id], ids, [tokenizer.eos_id])]
    lengths, sizes = [len(ids) + 2 for ids in encoded], [len(text.encode()) for text in texts]
    return Piece(np.concatenate(parts).astype(token_dtype(tokenizer)), lengths, sizes)


def _build(source: SourceConfig, tokenizer: Tokenizer, directory: Path, key: str, format: str) -> None:
    dtype = token_dtype(tokenizer)
    names = ("tokens", "document_starts", "document_bytes", *(() if format == "text" else ("marks",)))
    digests = {name: hashlib.sha256() for name in names}
    num_tokens = num_documents = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(directory / name, "wb")) for name in digests}
        progress = stack.enter_context(_progress(source))

        def write(name: str, array: np.ndarray) -> None:
            data = array.tobytes()
            digests[name].update(data)
            files[name].write(data)

        write("document_starts", np.zeros(1, "<i8"))
        for piece in _pieces(source, format, tokenizer, partial(progress.advance, progress.task_ids[0])):
            ends = num_tokens + np.cumsum(piece.lengths)
            write("tokens", piece.tokens.astype(dtype))
            write("document_starts", ends.astype("<i8"))
            write("document_bytes", np.array(piece.sizes, "<i8"))
            if piece.marks is not None:
                write("marks", piece.marks)
            num_tokens = int(ends[-1])
            num_documents += len(piece.lengths)
            progress.update(progress.task_ids[0], documents=num_documents, tokens=num_tokens)
    write_index(directory, key, source.name, dtype, digests, format)


def _pieces(
    source: SourceConfig, format: str, tokenizer: Tokenizer, on_bytes: Callable[[int], None]
) -> Iterator[Piece]:
    """Documents by the batch, so that neither the corpus is held in memory nor a core waits; records one by one."""
    if format != "text":
        # Here, as mistral-common takes a second to import, which text does not need.
        from mixtral_jax.data.marked_records import marked_records

        yield from marked_records(source, format, tokenizer, on_bytes)
        return
    batch: list[str] = []
    characters = 0
    for text in iter_documents(source, on_bytes):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH:
            yield encode_documents(tokenizer, batch)
            batch, characters = [], 0
    if batch:
        yield encode_documents(tokenizer, batch)


def write_index(
    directory: Path, key: str, source: str, dtype: str, digests: dict[str, Any], format: str = "text"
) -> None:
    """Writes the `index.json` of a cache whose other files are complete.

    Args:
        directory: the cache.
        key: says what it was made of; who opens it asks for the same.
        source: name of the text.
        dtype: of the tokens, see `token_dtype`.
        digests: SHA-256 objects of the files, by name.
        format: of the records, or `text`.
    """
    sha256 = {name: digest.hexdigest() for name, digest in digests.items()}
    sizes = {name: (directory / name).stat().st_size for name in digests}
    index = {
        "key": key,
        "source": source,
        "format": format,
        "num_documents": sizes["document_bytes"] // 8,
        "num_tokens": sizes["tokens"] // np.dtype(dtype).itemsize,
        "dtype": dtype,
        "content": _content(dtype, sha256),
        "sha256": sha256,
        "sizes": sizes,
    }
    (directory / "index.json").write_text(json.dumps(index, indent=1))


def _content(dtype: str, sha256: dict[str, str]) -> str:
    """Digests the tokens and boundaries themselves."""
    return hashlib.sha256(json.dumps([dtype, sha256]).encode()).hexdigest()


def _progress(source: SourceConfig) -> Progress:
    progress = Progress(
        TextColumn("tokenizing {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens", markup=False),
        TimeRemainingColumn(),
        console=make_console(),
    )
    progress.add_task(source.name, total=total_bytes(source), documents=0, tokens=0)
    return progress
