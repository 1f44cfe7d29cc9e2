"""The steps that end a pipeline: documents on disk, their tokens, and of these one token cache a language."""

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter

from mixtral_jax.data.cache_files import building, write_file
from mixtral_jax.data.token_cache import encode_documents, prepared_key, token_dtype, write_index
from mixtral_jax.preparation.counting import shared_tokenizer

BATCH = 1 << 20  # characters that are encoded at once
PARTS = ("tokens", "lengths", "bytes")


def stage_writer(folder: Path) -> JsonlWriter:
    """Writes documents with all that is known of them, for a later stage; zstd, for gzip notes the time of day."""
    return JsonlWriter(str(folder), output_filename="${rank}.jsonl.zst", compression="zstd")


def final_writer(folder: Path) -> JsonlWriter:
    """Writes documents for training, a directory for each language."""
    return JsonlWriter(str(folder), output_filename="${language}/${rank}.jsonl.zst", compression="zstd", adapter=_final)


def _final(self: JsonlWriter, document: Document) -> dict[str, Any]:
    metadata = document.metadata
    return {"text": document.text, "id": document.id, "source": metadata["source"], "url": metadata["url"],
            "date": metadata["date"]}  # fmt: skip


class TokenWriter(PipelineStep):
    """Writes the tokens of a task's documents by language, ready to be joined into token caches."""

    type = "🔢 - TOKENIZER"
    name = "tokenization"

    def __init__(self, folder: Path, tokenizer: str):
        """Names the folder (LANGUAGE/RANK.tokens, .lengths, .bytes) and the tokenizer."""
        super().__init__()
        self._folder = folder
        self._tokenizer = tokenizer

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the same documents."""
        waiting: dict[str, list[str]] = {}
        with contextlib.ExitStack() as stack:
            files: dict[str, list[IO[bytes]]] = {}
            for document in data:
                language = document.metadata["language"]
                if language not in files:
                    (self._folder / language).mkdir(parents=True, exist_ok=True)
                    names = [self._folder / language / f"{rank:05d}.{part}" for part in PARTS]
                    files[language] = [stack.enter_context(open(name, "wb")) for name in names]
                texts = waiting.setdefault(language, [])
                texts.append(document.text)
                if sum(map(len, texts)) > BATCH:
                    self._write(files[language], waiting.pop(language))
                yield document
            for language, texts in waiting.items():
                self._write(files[language], texts)

    def _write(self, files: list[IO[bytes]], texts: list[str]) -> None:
        tokenizer = shared_tokenizer(self._tokenizer)
        with self.track_time():
            tokens, lengths, sizes, _ = encode_documents(tokenizer, texts, threads=1)
        for file, array in zip(files, (tokens, np.array(lengths, "<i8"), np.array(sizes, "<i8")), strict=True):
            file.write(array.tobytes())
        self.stat_update("tokens", value=len(tokens))
        self.stat_update("bytes", value=sum(sizes))


class CacheBuilder(PipelineStep):
    """Joins the tokens of all tasks, a language a task, as training opens them; one without documents gets no cache."""

    type = "🔢 - TOKENIZER"
    name = "token caches"

    def __init__(self, parts: Path, target: Path, languages: list[str], tokenizer: str):
        """Names where `TokenWriter` wrote, where caches go, the languages and the tokenizer."""
        super().__init__()
        self._parts = parts
        self._target = target
        self._languages = languages
        self._tokenizer = tokenizer

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Builds the cache of language number `rank`."""
        language = self._languages[rank]
        tokenizer = shared_tokenizer(self._tokenizer)
        self._target.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            write_file(self._target.parent / "tokenizer.model", tokenizer.model_bytes)
        ranks = sorted((self._parts / language).glob("*.tokens"))
        if not ranks:
            return None
        lengths = np.concatenate([np.fromfile(file.with_suffix(".lengths"), "<i8") for file in ranks])
        sizes = np.concatenate([np.fromfile(file.with_suffix(".bytes"), "<i8") for file in ranks])
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        with building(self._target / language) as directory:
            with open(directory / "tokens", "wb") as tokens:
                for file in ranks:
                    with open(file, "rb") as part:
                        shutil.copyfileobj(part, tokens, 1 << 22)
            starts.tofile(directory / "document_starts")
            sizes.tofile(directory / "document_bytes")
            digests = {}
            for name in ("tokens", "document_starts", "document_bytes"):
                with open(directory / name, "rb") as written:
                    digests[name] = hashlib.file_digest(written, "sha256")
            write_index(directory, prepared_key(tokenizer), language, token_dtype(tokenizer), digests)
        return None
