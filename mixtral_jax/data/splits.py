"""Views of a token cache: the documents for training and those held out for evaluation."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32, Int64, Integer

from mixtral_jax.data.token_cache import TokenCache
from mixtral_jax.data.tokenizer import Tokenizer

TOLERANCE = 1.25  # as long as whole documents come within this factor of the wanted share, none is cut
WORD_SEARCH = 256  # tokens among which the cut looks for the begin of a word


@dataclass(frozen=True, eq=False)
class Documents:
    """An immutable choice of documents, in the order of their source.

    Every document begins with BOS. It ends with EOS, save for one whose tail was held out.
    """

    name: str
    buffer: Integer[np.ndarray, "tokens"]  # of the whole source
    starts: Int64[np.ndarray, "documents"]  # places in `buffer`; what stands there is read as BOS
    offsets: Int64[np.ndarray, "documents+1"]  # places in the concatenation of these documents
    byte_counts: Int64[np.ndarray, "documents"]
    bos_id: int
    fingerprint: str

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

    def num_bytes(self, index: int) -> int:
        """UTF-8 bytes of one document's text."""
        return int(self.byte_counts[index])


def split_documents(cache: TokenCache, holdout: float, seed: int, tokenizer: Tokenizer) -> tuple[Documents, Documents]:
    """Holds out about a share of a source's tokens, by document.

    Documents are drawn by a seeded permutation until their tokens reach the share. If neither with nor without the last
    of them the share is met nearly, as in a source of few long documents, only the tail of that one is held out, from
    the begin of a word on; it then begins with a BOS of its own, and the head, without EOS, stays for training.

    Args:
        cache: the source.
        holdout: share of the tokens, 0 to below 1; 0 holds out nothing.
        seed: of the permutation.
        tokenizer: the one of the cache; it counts the bytes of a tail.

    Returns:
        The documents for training and those held out.
    """
    starts = np.asarray(cache.document_starts[:-1])
    lengths = np.diff(cache.document_starts)
    sizes = np.array(cache.document_bytes)
    wanted = holdout * cache.num_tokens
    order = np.random.default_rng(seed).permutation(cache.num_documents)
    reached = np.concatenate([[0], np.cumsum(lengths[order])])
    count = int(np.searchsorted(reached, wanted))
    fits = count < cache.num_documents and reached[count] <= TOLERANCE * wanted
    if not fits and reached[count - 1] * TOLERANCE >= wanted > 0:
        count, fits = count - 1, True
    held = np.zeros(cache.num_documents, bool)
    held[order[:count]] = True
    kept = ~held
    held_starts, held_lengths, held_sizes = starts.copy(), lengths.copy(), sizes.copy()
    if not fits:
        last = int(order[count - 1])
        tokens = cache.document(last)
        tail = max(1, round(wanted - reached[count - 1]))
        cut = _cut(tokens, min(tail, len(tokens) - 2), tokenizer)
        tail_bytes = int(tokenizer.token_bytes[tokens[cut:]].sum())
        kept[last] = True
        lengths[last] = cut
        sizes[last] -= tail_bytes
        # The tail's view begins one token early, at a place that is read as BOS.
        held_starts[last] += cut - 1
        held_lengths[last] -= cut - 1
        held_sizes[last] = tail_bytes
    fingerprint = f"{cache.fingerprint} {holdout} {seed}"

    def view(chosen: np.ndarray, starts: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> Documents:
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
        return Documents(
            cache.name, cache.tokens, starts[chosen], offsets, sizes[chosen], tokenizer.bos_id, fingerprint
        )

    return view(kept, starts, lengths, sizes), view(held, held_starts, held_lengths, held_sizes)


def _cut(tokens: Integer[np.ndarray, "length"], tail: int, tokenizer: Tokenizer) -> int:
    """Place of the first token of a tail of about so many tokens: where a word begins, if one does nearby."""
    cut = len(tokens) - tail
    words = np.flatnonzero(tokenizer.begins_word[tokens[cut : min(cut + WORD_SEARCH, len(tokens) - 1)]])
    return cut + int(words[0]) if len(words) else cut
