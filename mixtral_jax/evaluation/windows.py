"""Documents -> rows in which every token of a document, but its first, is predicted exactly once.

The first token is the start sign, which nothing precedes. The end sign does count: a model must learn to stop.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from jaxtyping import Bool, Int32, Integer

from mixtral_jax.config import EvalConfig
from mixtral_jax.console import ProgressLine
from mixtral_jax.data.batch import Batch, padding
from mixtral_jax.data.splits import Documents
from mixtral_jax.pytree import pytree


@pytree
@dataclass(frozen=True, eq=False)
class EvaluationBatch(Batch[np.ndarray]):
    """A batch whose targets are counted by document."""

    # Number of the document, where it is not padding.
    documents: Int32[np.ndarray, "batch seq"] = field(kw_only=True)


@dataclass(frozen=True)
class Window:
    """A stretch of one document, or of another text, that the model sees at once."""

    index: int  # of the document
    tokens: Integer[np.ndarray, " tokens"]  # the inputs and, unless the document ends with them, one more
    counts: Bool[np.ndarray, " tokens"]  # which of these are predicted here, and in no other window
    size: int  # inputs


def window_sizes(eval: EvalConfig, seq_len: int) -> tuple[int, int]:
    """Resolves the zeros of the configuration.

    Args:
        eval: how to cut.
        seq_len: tokens of a training row.

    Returns:
        Context and stride, in tokens; the stride of the modes that have none is the context.
    """
    context = eval.context or seq_len
    return context, (eval.stride or math.ceil(context / 2)) if eval.mode == "strided" else context


def num_selected(documents: Documents, max_tokens: int) -> int:
    """Counts the documents that are evaluated: the first ones, whole, until `max_tokens` are predicted; 0: all."""
    if not max_tokens:
        return documents.num_documents
    predicted = 0
    for index in range(documents.num_documents):
        predicted += int(np.count_nonzero(documents.counts(index)))
        if predicted >= max_tokens:
            return index + 1
    return documents.num_documents


def evaluation_batches(documents: Documents, eval: EvalConfig, seq_len: int) -> Iterator[EvaluationBatch]:
    """Cuts documents into batches of one fixed shape.

    - packed: documents follow one another through the rows as in training; one that crosses the end of a row goes on
      in the next without memory of the last. Records of chats, which training leaves whole, are as in `document`.
    - document: every document from its start, in successive windows of `context` tokens.
    - strided: a window of `context` tokens moves on by `stride`; a token is predicted in the first window that
      reaches it, so after at least context - stride tokens, or all from the start of its document.

    In the last two modes a row holds as many whole windows as fit, each a segment of its own: attention must stop at
    segments also for a model that was trained to attend across documents.

    Args:
        documents: one source.
        eval: mode, context, stride, rows of a batch and the limit of tokens.
        seq_len: tokens of a training row; the context where `eval` sets none.

    Yields:
        Batches [batch_size, context].
    """
    context, _ = window_sizes(eval, seq_len)
    rows = _rows(documents, eval, seq_len)
    while chosen := list(islice(rows, eval.batch_size)):
        yield batch_of(chosen, eval.batch_size, context)


def batch_of(rows: Sequence[Sequence[Window]], batch_size: int, context: int) -> EvaluationBatch:
    """Makes a batch [batch_size, context] of the windows of its first rows, each window a segment of its own."""
    empty = padding(batch_size, context)
    batch = EvaluationBatch(**vars(empty), documents=np.zeros((batch_size, context), np.int32))
    for row, windows in enumerate(rows):
        start = 0
        for segment, window in enumerate(windows, 1):
            here = slice(start, start + window.size)
            predicted = slice(start, start + len(window.tokens) - 1)  # one less where the document ends
            batch.tokens[row, here] = window.tokens[: window.size]
            batch.targets[row, predicted] = window.tokens[1:]
            batch.segment_ids[row, here] = segment
            batch.documents[row, here] = window.index
            batch.positions[row, here] = np.arange(window.size)
            batch.loss_mask[row, predicted] = window.counts[1:]
            start += window.size
    return batch


def num_batches(documents: Documents, eval: EvalConfig, seq_len: int) -> int:
    """Counts the batches of `evaluation_batches`, for a progress bar."""
    return math.ceil(sum(1 for _ in _rows(documents, eval, seq_len)) / eval.batch_size)


def progress_line(
    title: str, texts: Sequence[Documents], eval: EvalConfig, seq_len: int, passes: int = 1
) -> ProgressLine:
    """Makes a progress bar over the batches of so many passes over all texts."""
    total = passes * sum(num_batches(documents, eval, seq_len) for documents in texts)
    return ProgressLine(title, total, plain_line_seconds=30.0)


def _rows(documents: Documents, eval: EvalConfig, seq_len: int) -> Iterator[list[Window]]:
    """Puts windows into rows, in order."""
    context, stride = window_sizes(eval, seq_len)
    row: list[Window] = []
    room = context
    for index in range(num_selected(documents, eval.max_tokens)):
        document, counts = documents.tokens(index), documents.counts(index)
        if eval.mode == "packed" and documents.format == "text":
            windows = _cut(index, document, counts, room, context)
        else:
            windows = _slide(index, document, counts, context, stride)
        for window in windows:
            if window.size > room:
                yield row
                row, room = [], context
            row.append(window)
            room -= window.size
            if not room:
                yield row
                row, room = [], context
    if row:
        yield row


def _cut(index: int, document: np.ndarray, counts: np.ndarray, room: int, context: int) -> Iterator[Window]:
    """Fills the room that is left in a row, then whole rows; the end sign takes a place, as in training."""
    begin, end = 0, min(room, len(document))
    while begin < len(document):
        yield Window(index, document[begin : end + 1], counts[begin : end + 1], end - begin)
        begin, end = end, min(end + context, len(document))


def _slide(index: int, document: np.ndarray, counts: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Moves a window over the document; the end sign is never an input, since nothing follows it."""
    begin = predicted = 0
    last = len(document) - 1
    while predicted < last:
        end = min(begin + context, last)
        counted = counts[begin : end + 1] & (np.arange(begin, end + 1) > predicted)
        yield Window(index, document[begin : end + 1], counted, end - begin)
        begin, predicted = begin + stride, end
