"""Joins the tokens of all tasks into one token cache a language, as training opens it (`prepared:` of a source)."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from mixtral_jax.data.cache_files import building, write_file
from mixtral_jax.data.token_cache import prepared_key, token_dtype, write_index
from mixtral_jax.preparation.counting import shared_tokenizer


class CacheBuilder(PipelineStep):
    """Builds the cache of one language a task; a language without documents gets none."""

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
