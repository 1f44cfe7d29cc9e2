"""Counts what flows between two steps: documents, characters, bytes and tokens, by source and language."""

import zlib
from collections import Counter
from functools import lru_cache

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from mixtral_jax.config import DataConfig
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer

ANY_SIZE = 1 << 31  # prepare has no model that a vocabulary must fit


@lru_cache
def shared_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name or file, once a process."""
    return load_tokenizer(DataConfig(tokenizer=name, seq_len=1), ANY_SIZE)


class Meter(PipelineStep):
    """Lets documents through and counts them under the name of the step before."""

    type = "meter"

    def __init__(self, step: str, tokenizer: str = "", lengths: bool = False):
        """Says what to count.

        Args:
            step: name of the step whose output passes.
            tokenizer: counts tokens too, where the text is more than raw HTML.
            lengths: counts also, by language, how many documents have 2^n to 2^(n+1) - 1 characters.
        """
        super().__init__()
        self.name = step
        self.stats.name = str(self)
        self._tokenizer = tokenizer
        self._lengths = lengths

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the same documents."""
        counts: Counter[str] = Counter()
        for document in data:
            metadata = document.metadata
            group = f"{metadata['source']}|{metadata['language'] or '-'}"
            encoded = document.text.encode()
            counts[f"documents|{group}"] += 1
            counts[f"characters|{group}"] += len(document.text)
            counts[f"bytes|{group}"] += len(encoded)
            if self._tokenizer:
                counts[f"tokens|{group}"] += self._tokens(metadata, document.text, encoded)
            if self._lengths:
                counts[f"length|{metadata['language']}|{len(document.text).bit_length() - 1}"] += 1
            yield document
        for label, count in counts.items():
            self.stat_update(label, value=count)

    def _tokens(self, metadata: dict[str, object], text: str, encoded: bytes) -> int:
        """Tokens of a text, counted anew only when an earlier step changed it."""
        with self.track_time():
            check = zlib.crc32(encoded)
            known = metadata.get("counted")
            if not isinstance(known, list) or known[0] != check:
                known = [check, len(shared_tokenizer(self._tokenizer).encode_batch([text], threads=1)[0])]
                metadata["counted"] = known
            return known[1]
