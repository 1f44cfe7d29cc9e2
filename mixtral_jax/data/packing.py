"""Packing: rows of a fixed length over the concatenation of documents, with everything a model needs beside the tokens.

Row i holds the tokens from i * seq_len on, and one more as the last target, so every token is a target in exactly one
row, save the first of each document, which nothing before it can predict.
"""

import numpy as np
from jaxtyping import Int64

from mixtral_jax.data.batch import Batch, HostBatch
from mixtral_jax.data.row_order import place_of_row
from mixtral_jax.data.splits import Documents


class TextRows:
    """The rows of one source; one shorter than a row is repeated to fill it."""

    def __init__(self, documents: Documents, seq_len: int):
        """Lays out the rows; nothing is read."""
        self.copies = max(1, seq_len // max(1, documents.num_tokens))
        self._documents = documents.repeated(self.copies)
        self._seq_len = seq_len
        self.count = num_rows(self._documents, seq_len)
        self.empty = max(0, self.count * seq_len - self._documents.num_tokens)  # places of the last row without a token

    def pack(self, rows: Int64[np.ndarray, "rows"]) -> HostBatch:
        """Builds rows, see `pack_rows`."""
        return pack_rows(self._documents, rows, self._seq_len)

    def tokens_of(self, dealt: int, seed: int, source: int) -> int:
        """Counts the tokens of the first so many rows of the source that a run takes, over all epochs."""
        epochs, begun = divmod(dealt, self.count)
        padded = epochs + (place_of_row(self.count - 1, epochs, self.count, seed, source) < begun)
        return dealt * self._seq_len - padded * self.empty


def num_rows(documents: Documents, seq_len: int) -> int:
    """Rows of `seq_len` tokens that hold every target of some documents; the last row may end in padding."""
    return -(-max(0, documents.num_tokens - 1) // seq_len)


def pack_rows(documents: Documents, rows: Int64[np.ndarray, "rows"], seq_len: int) -> HostBatch:
    """Builds rows: tokens, the targets that follow them, and where documents begin and end.

    Args:
        documents: the text.
        rows: which rows, each from 0 to below `num_rows`.
        seq_len: tokens of a row.

    Returns:
        A batch [rows, seq_len]. A document that goes on from the row before begins anew, at position 0; a target counts
        where it is a token of the same document.
    """
    columns = np.arange(seq_len + 1)
    row_starts = rows * seq_len
    places = row_starts[:, None] + columns
    padding = places >= documents.num_tokens
    row_ends = np.minimum(row_starts + seq_len, documents.num_tokens - 1)  # place of the last token, inclusive
    first = np.searchsorted(documents.offsets, row_starts, side="right") - 1
    last = np.searchsorted(documents.offsets, row_ends, side="right") - 1

    # Mark where each further document of a row begins; counting the marks numbers the documents.
    counts = last - first
    row_of = np.repeat(np.arange(len(rows)), counts)
    document_of = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[row_of] + 1
    begins = np.zeros(places.shape, np.int32)
    begins[row_of, documents.offsets[document_of] - row_starts[row_of]] = 1
    segments = np.cumsum(begins, axis=1, dtype=np.int32)

    shifts = documents.starts - documents.offsets[:-1]
    document = first[:, None] + segments
    tokens = documents.buffer[np.where(padding, 0, places + shifts[document])].astype(np.int32)
    begins[:, 0] = row_starts == documents.offsets[first]
    tokens[begins.astype(bool)] = documents.bos_id
    tokens[padding] = 0
    begin_of = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    positions = np.where(padding, 0, columns - begin_of)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.where(padding, 0, segments + 1)[:, :-1].astype(np.int32),
        positions=positions[:, :-1].astype(np.int32),
        loss_mask=(segments[:, :-1] == segments[:, 1:]) & ~padding[:, 1:],
    )
