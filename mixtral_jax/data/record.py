"""What a model was trained on and what was held out, document by document: kept in every checkpoint, asked by all.

Eight bytes a document, and eight for about 1,024 tokens. Of 10**9 documents of 1,000 tokens that makes 16 GB, beside
the 560 GB of one checkpoint of 8x7B; a filter with false answers would take a quarter of it, and is not worth them.
"""

import dataclasses
import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt64

from mixtral_jax.data.fingerprints import Fingerprints
from mixtral_jax.data.row_order import mix
from mixtral_jax.data.token_cache import TokenCache
from mixtral_jax.data.tokenizer import Tokenizer

FILE = "documents.npz"  # in a checkpoint
TOLERANCE = 1.25  # as long as whole documents come within this factor of the wanted share, none is cut
WORD_SEARCH = 256  # tokens among which the cut looks for the begin of a word
FEWEST = 4  # known windows, at least half of a document's, that make it a changed copy of a text that was trained on

log = logging.getLogger(__name__)
Hashes = UInt64[np.ndarray, " _"]  # ascending
NONE = np.zeros(0, np.uint64)


@dataclass(frozen=True, eq=False)
class DocumentRecord:
    """What a run and those that it began from were trained on, and what the run holds out."""

    trained: Hashes  # documents, whole
    held_out: Hashes  # documents, whole
    cut: Hashes  # documents whose tail was held out
    cut_places: Int64[np.ndarray, " _"]  # tokens of each of these that were trained on
    windows: Hashes  # in what was trained on
    complete: bool = True  # False: it began from parameters of which nothing is known

    @cached_property
    def content(self) -> bytes:
        """The record as a file, which `read` reads."""
        file = io.BytesIO()
        np.savez(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return file.getvalue()

    @cached_property
    def fingerprint(self) -> str:
        """Tells records apart."""
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def read(cls, content: bytes) -> "DocumentRecord":
        """Reads a record back."""
        with np.load(io.BytesIO(content)) as stored:
            arrays: dict[str, Any] = dict(stored)
        return cls(**arrays | {"complete": bool(arrays["complete"])})

    def trained_until(self, prints: Fingerprints, lengths: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Says how many tokens of each document, from its first on, were trained on.

        Args:
            prints: of the documents.
            lengths: of the documents, tokens.
        """
        until = np.where(_contains(self.trained, prints.documents), lengths, 0)
        is_cut = _contains(self.cut, prints.documents)
        until[is_cut] = self.cut_places[np.searchsorted(self.cut, prints.documents[is_cut])]
        known = _contains(self.windows, prints.windows)
        of_each = [np.bincount(owners, minlength=len(lengths))
                   for owners in (prints.window_documents, prints.window_documents[known])]  # fmt: skip
        changed = (until == 0) & ~self.holds(prints) & (of_each[1] >= FEWEST) & (2 * of_each[1] >= of_each[0])
        return np.where(changed, lengths, until)

    def holds(self, prints: Fingerprints) -> Bool[np.ndarray, " n"]:
        """Says which documents the run held out, whole or their tails."""
        return _contains(self.held_out, prints.documents) | _contains(self.cut, prints.documents)


NOTHING = DocumentRecord(NONE, NONE, NONE, NONE.astype(np.int64), NONE)


def hold_out(
    sources: Sequence[tuple[TokenCache, Fingerprints]],
    holdout: float,
    seed: int,
    tokenizer: Tokenizer,
    before: DocumentRecord = NOTHING,
) -> DocumentRecord:
    """Decides what a run holds out: about a share of each source's tokens, by document.

    Documents are taken in an order that their hashes and the seed decide, copies together, until their tokens reach the
    share. If neither with nor without the last of them the share is met nearly, as in a source of few long documents,
    only the tail of that one is held out, from the begin of a word on. What an earlier source has decided holds for its
    copies in later ones, and nothing is held out that was trained on before.

    Args:
        sources: cache and fingerprints of each.
        holdout: share of the tokens, 0 to below 1; 0 holds out nothing.
        seed: of the order.
        tokenizer: the one of the caches.
        before: of the run that this one takes its parameters from.

    Returns:
        The record that the run keeps.
    """
    record = dataclasses.replace(before, held_out=NONE)
    for cache, prints in sources:
        record = _extend(record, cache, prints, holdout, seed, tokenizer)
    return record


def _extend(
    record: DocumentRecord, cache: TokenCache, prints: Fingerprints, holdout: float, seed: int, tokenizer: Tokenizer
) -> DocumentRecord:
    documents, first, inverse, copies = np.unique(
        prints.documents, return_index=True, return_inverse=True, return_counts=True
    )
    lengths = np.diff(cache.document_starts)
    until, held, lengths = record.trained_until(prints, lengths)[first], record.holds(prints)[first], lengths[first]
    if not holdout:  # also what was held out before
        until[held], held = lengths[held], np.zeros_like(held)
    free = np.flatnonzero((until == 0) & ~held)
    order = free[np.argsort(mix(documents[free] ^ mix(np.uint64(seed & (2**64 - 1)))))]
    wanted = holdout * cache.num_tokens
    missing = wanted - ((lengths - until) * copies)[held].sum()
    count, needs_cut = _how_many((lengths * copies)[order], missing, spare=bool(until.any()))
    if needs_cut and cache.marks is not None:  # a record of a chat stays whole
        count, needs_cut = min(count + 1, len(order) - (not until.any())), False
    chosen = order[:count]
    missing -= (lengths * copies)[chosen].sum()
    until[free] = lengths[free]
    until[chosen] = 0
    if needs_cut:
        last = order[count]
        until[last] = _cut(cache.document(int(first[last])), max(1, round(missing / copies[last])), tokenizer)
    elif missing > wanted / 2:
        log.warning("source '%s': %.2g of it is held out, not data.holdout=%g: the rest was trained on before",
                    cache.name, (wanted - missing) / cache.num_tokens, holdout)  # fmt: skip
    is_cut = (until > 0) & (until < lengths)
    others = ~_contains(documents, record.cut)
    cut = np.append(record.cut[others], documents[is_cut])
    cut_places = np.append(record.cut_places[others], until[is_cut])
    by_hash = np.argsort(cut)
    in_training = prints.window_ends <= until[inverse][prints.window_documents]
    return DocumentRecord(
        trained=np.union1d(record.trained, documents[until == lengths]),
        held_out=np.union1d(record.held_out, documents[chosen]),
        cut=cut[by_hash],
        cut_places=cut_places[by_hash],
        windows=np.union1d(record.windows, prints.windows[in_training]),
        complete=record.complete,
    )


def _how_many(sizes: Int64[np.ndarray, " n"], wanted: float, *, spare: bool) -> tuple[int, bool]:
    """How many documents, of these sizes, to hold out, and whether the tail of the next one is needed too.

    Args:
        sizes: tokens, in the order in which they are taken.
        wanted: tokens.
        spare: whether something is left for training when all are taken.
    """
    if wanted <= 0 or not len(sizes):
        return 0, False
    reached = np.concatenate([[0], np.cumsum(sizes)])
    count = min(int(np.searchsorted(reached, wanted)), len(sizes))
    if (spare or count < len(sizes)) and reached[count] <= TOLERANCE * wanted:
        return count, False
    return count - 1, bool(reached[count - 1] * TOLERANCE < wanted)


def _cut(tokens: Integer[np.ndarray, " length"], tail: int, tokenizer: Tokenizer) -> int:
    """Place of the first token of a tail of about so many tokens: where a word begins, if one does nearby."""
    cut = len(tokens) - min(tail, len(tokens) - 2)
    words = np.flatnonzero(tokenizer.begins_word[tokens[cut : min(cut + WORD_SEARCH, len(tokens) - 1)]])
    return cut + int(words[0]) if len(words) else cut


def _contains(ascending: Hashes, values: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Says which values are among others."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values
