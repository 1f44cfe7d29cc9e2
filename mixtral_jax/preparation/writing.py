"""The steps that end a pipeline: documents on disk, and their tokens."""

import contextlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter

from mixtral_jax.data.token_cache import encode_documents
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
