"""Views of a token cache: the documents for training, those held out, and those to measure a model on."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, UInt8

from mixtral_jax.data.answers import ANSWER
from mixtral_jax.data.fingerprints import Fingerprints
from mixtral_jax.data.record import DocumentRecord
from mixtral_jax.data.token_cache import TokenCache
from mixtral_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Documents:
    """An immutable choice of documents, in the order of their source.

    Every document begins with BOS. It ends with EOS, save for one whose tail was held out. A document with marks is a
    record of a chat, or of one chat with the better and one with the worse answer; see `answers`.
    """

    name: str
    buffer: Integer[np.ndarray, "tokens"]  # of the whole source
    starts: Int64[np.ndarray, "documents"]  # places in `buffer`; what stands there is read as BOS
    offsets: Int64[np.ndarray, "documents+1"]  # places in the concatenation of these documents
    byte_counts: Int64[np.ndarray, "documents"]
    bos_id: int
    fingerprint: str
    format: str = "text"
    marks: UInt8[np.ndarray, "tokens"] | None = None  # of what lies in `buffer`
    check_unchanged: Callable[[], None] = lambda: None  # raises `UserError` where the files below were written to
    # Log-probabilities of it in nats, and for KTO those of the answers after the prompts that `RecordRows` gives them.
    reference: Float32[np.ndarray, "one_or_two tokens"] | None = None

    @property
    def num_documents(self) -> int:
        """Documents in this view."""
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens in this view, BOS and EOS included."""
        return int(self.offsets[-1])

    @cached_property
    def total_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.byte_counts.sum())

    def tokens(self, index: int) -> Int32[np.ndarray, "_"]:
        """The tokens of one document, from BOS on."""
        start, length = self.starts[index], self.offsets[index + 1] - self.offsets[index]
        tokens = self.buffer[start : start + length].astype(np.int32)
        tokens[0] = self.bos_id
        return tokens

    def counts(self, index: int) -> Bool[np.ndarray, "_"]:
        """Which tokens of a document a model is measured on: all but BOS, and of a chat the answers alone."""
        start, length = self.starts[index], self.offsets[index + 1] - self.offsets[index]
        if self.marks is None:
            return np.arange(length) > 0
        return self.marks[start : start + length] & ANSWER > 0

    def num_bytes(self, index: int) -> int:
        """UTF-8 bytes of one document's text, of a chat those of the answers."""
        return int(self.byte_counts[index])

    def repeated(self, times: int) -> "Documents":
        """All of these documents, and again, so many times in all."""
        offsets = np.append(0, np.cumsum(np.tile(np.diff(self.offsets), times))).astype(np.int64)
        starts, sizes = np.tile(self.starts, times), np.tile(self.byte_counts, times)
        return dataclasses.replace(self, starts=starts, offsets=offsets, byte_counts=sizes)


class MeasuredText(NamedTuple):
    """What a model is measured on, and what is known of it."""

    documents: Documents  # of one source
    # held-out: the run's, kept from training; training text: the source has nothing else; unknown: there is no record.
    kind: Literal["held-out", "other text", "training text", "unknown"]
    trained_share: float | None  # of the tokens of the whole source, that the model was trained on; None: unknown


class Split:
    """What a record says of the documents of one source.

    A document that was cut is two: its head was trained on, its tail, with a BOS of its own, was not.
    """

    def __init__(self, cache: TokenCache, prints: Fingerprints, record: DocumentRecord, tokenizer: Tokenizer):
        """Looks every document up.

        Args:
            cache: the source.
            prints: its fingerprints.
            record: of the run.
            tokenizer: the one of the cache; it counts the bytes of a tail.
        """
        self._cache = cache
        self._bos_id = tokenizer.bos_id
        self._fingerprint = f"{cache.fingerprint} {record.fingerprint}"
        self._lengths = np.diff(cache.document_starts)
        self._until = record.trained_until(prints, self._lengths)
        self._held = record.holds(prints)
        self._tail_bytes = np.where(self._until > 0, 0, cache.document_bytes)
        for index in np.flatnonzero(self._held & (self._until > 0)):
            tail = cache.document(int(index))[self._until[index] :]
            self._tail_bytes[index] = tokenizer.token_bytes[tail].sum()

    def training(self) -> Documents:
        """What is trained on."""
        return self._view(self._until > 0, 0, self._until, self._cache.document_bytes - self._tail_bytes)

    def held_out(self) -> Documents:
        """What the run keeps from training."""
        return self._rest(self._held)

    def to_measure(self) -> MeasuredText:
        """Of a source that is mostly the run's, what the run held out; of any other, all that was not trained on.

        Where there is neither, the training text.
        """
        tokens = self._cache.num_tokens
        share = float(self._until.sum() / tokens)
        ours = self._held | (self._until > 0)
        if self._held.any() and 2 * self._lengths[ours].sum() >= tokens:
            return MeasuredText(self.held_out(), "held-out", share)
        fresh = self._held | (self._until == 0)
        if fresh.any():
            return MeasuredText(self._rest(fresh), "other text", share)
        return MeasuredText(self.training(), "training text", share)

    def _rest(self, chosen: Bool[np.ndarray, "n"]) -> Documents:
        """What comes after the part that was trained on; a tail begins one token early, at a place read as BOS."""
        skipped = np.maximum(self._until - 1, 0)
        return self._view(chosen, skipped, self._lengths - skipped, self._tail_bytes)

    def _view(
        self,
        chosen: Bool[np.ndarray, "n"],
        skipped: Int64[np.ndarray, "n"] | int,
        lengths: Int64[np.ndarray, "n"],
        sizes: Int64[np.ndarray, "n"],
    ) -> Documents:
        starts = self._cache.document_starts[:-1] + skipped
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
        return Documents(self._cache.name, self._cache.tokens, starts[chosen], offsets, sizes[chosen],
                         self._bos_id, self._fingerprint, self._cache.format, self._cache.marks,
                         self._cache.check_unchanged)  # fmt: skip
