"""Perplexity of held-out text: sums first, one division at the end; and the two models that any must beat."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from mixtral_jax.config import EvalConfig, UserError
from mixtral_jax.console import silent
from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.intervals import Interval, bootstrap_sums, interval
from mixtral_jax.evaluation.scoring import Score
from mixtral_jax.evaluation.windows import evaluation_batches, num_batches, num_selected, window_sizes

MOST_NATS = 700.0  # per token; exp of more is infinite


class Intervals(NamedTuple):
    """Where the numbers of a `Result` would lie on other documents, with 95% confidence."""

    nats_per_token: Interval
    perplexity: Interval
    bits_per_byte: Interval


@dataclass(frozen=True)
class Result:
    """Sums over whole documents, and what follows from them."""

    tokens: int  # predicted: all but the start signs
    bytes: int  # UTF-8, of the documents' text
    nats: float  # sum of -log p
    # The same three numbers of each document, source by source.
    documents: tuple[Float64[np.ndarray, "_ 3"], ...] = field(default=(), compare=False, repr=False)

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy; depends on the tokenizer."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); depends on the tokenizer."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Length of the text, coded by the model, per byte: compares models with different tokenizers."""
        return self.nats / math.log(2) / self.bytes

    def intervals(self) -> Intervals | None:
        """Draws documents anew within every source; None where a source has fewer than two."""
        sums = bootstrap_sums(self.documents)
        if sums is None:
            return None
        tokens, size, nats = sums.T
        per_token = interval(nats / tokens)
        return Intervals(
            per_token, (math.exp(per_token[0]), math.exp(per_token[1])), interval(nats / math.log(2) / size)
        )


@dataclass(frozen=True)
class Evaluation:
    """Results by source, and how they were measured."""

    sources: Mapping[str, Result]
    mode: str
    context: int  # tokens
    stride: int  # tokens

    @property
    def total(self) -> Result:
        """All sources together: the sums of their sums."""
        return add_up(list(self.sources.values()))


def add_up(results: Sequence[Result]) -> Result:
    """Adds results of different texts."""
    return Result(
        tokens=sum(result.tokens for result in results),
        bytes=sum(result.bytes for result in results),
        nats=math.fsum(result.nats for result in results),
        documents=tuple(stratum for result in results for stratum in result.documents),
    )


@dataclass(frozen=True)
class Difference:
    """Bits per byte of the second less those of the first, on one text."""

    bits_per_byte: float
    interval: Interval | None  # by drawing the same documents for both; None: too few, or other documents


def difference(first: Result, second: Result) -> Difference:
    """Subtracts bits per byte, with an interval where both were measured on the same documents."""
    value = second.bits_per_byte - first.bits_per_byte
    sizes = [[stratum[:, 1] for stratum in result.documents] for result in (first, second)]
    same = len(sizes[0]) == len(sizes[1]) and all(map(np.array_equal, *sizes))
    if not same:
        return Difference(value, None)
    pairs = zip(first.documents, second.documents, strict=True)
    sums = bootstrap_sums([np.stack([a[:, 1], b[:, 2] - a[:, 2]], axis=1) for a, b in pairs])
    return Difference(value, None if sums is None else interval(sums[:, 1] / sums[:, 0] / math.log(2)))


def measure(
    score: Score,
    sources: Sequence[Documents],
    eval: EvalConfig,
    seq_len: int,
    on_batch: Callable[[str], None] = silent,
) -> Evaluation:
    """Measures a model on every source.

    Args:
        score: see `Score`.
        sources: held-out documents, one entry a source.
        eval: how to cut them and how many tokens to take of each.
        seq_len: tokens of a training row.
        on_batch: called after each batch with the source's name.

    Returns:
        Sums of each source and each of its documents, in float64.

    Raises:
        UserError: a source has no text, or the model's score of it is not finite.
    """
    results = {}
    for documents in sources:
        counts = _document_sizes(documents, eval)
        batches = num_batches(documents, eval, seq_len)
        for done, batch in enumerate(evaluation_batches(documents, eval, seq_len), 1):
            mask = batch.loss_mask
            nats = finite_nats(score(batch).nats, mask, f"source '{documents.name}'", f"batch {done} of {batches}")
            which = batch.documents[mask]
            counts[:, 0] += np.bincount(which, minlength=len(counts))
            counts[:, 2] += np.bincount(which, weights=nats, minlength=len(counts))
            on_batch(documents.name)
        tokens, size, _ = counts.sum(axis=0)
        results[documents.name] = Result(int(tokens), int(size), math.fsum(counts[:, 2]), (counts,))
    context, stride = window_sizes(eval, seq_len)
    return Evaluation(results, eval.mode, context, stride)


def finite_nats(
    nats: Float[np.ndarray, "rows context"], mask: Bool[np.ndarray, "rows context"], what: str, where: str
) -> Float64[np.ndarray, " targets"]:
    """Takes the scores of a batch's targets; a score that is not finite is an error, never averaged away.

    Args:
        nats: [rows, context], -log p of every position.
        mask: [rows, context], which positions are targets.
        what: names the text in an error.
        where: names the place in it.

    Raises:
        UserError: a score is not a finite number.
    """
    chosen = nats[mask].astype(np.float64)
    bad = ~(chosen <= MOST_NATS)  # so written, it is also true of nan
    if bad.any():
        raise UserError(
            f"the model's score of {what} is {chosen[bad][0]:g} in {where}: "
            "its parameters have diverged, so evaluate an earlier checkpoint"
        )
    return chosen


def _document_sizes(documents: Documents, eval: EvalConfig) -> Float64[np.ndarray, "_ 3"]:
    """Makes the table of a source's documents: tokens (zero as yet), bytes, nats (zero as yet)."""
    counts = np.zeros((num_selected(documents, eval.max_tokens), 3))
    counts[:, 1] = [documents.num_bytes(index) for index in range(len(counts))]
    if not counts[:, 1].sum():
        raise UserError(
            f"source '{documents.name}' has no held-out text: raise data.holdout or give the source more documents"
        )
    return counts


def uniform_nats(heldout: Documents, vocab_size: int, max_tokens: int = 0) -> float:
    """Sums -log p of held-out tokens under a model that finds every token equally likely; see `unigram_nats`."""
    selected = range(num_selected(heldout, max_tokens))
    return sum(np.count_nonzero(heldout.counts(index)) for index in selected) * math.log(vocab_size)


def unigram_nats(
    train: Documents,
    heldout: Documents,
    vocab_size: int,
    max_tokens: int = 0,
    max_train_tokens: int = 50_000_000,
) -> float:
    """Sums -log p of held-out tokens under a model that knows only how often each token occurs.

    p(token) = (its training count + 1) / (all training counts + vocab_size). Start signs are neither counted nor
    predicted, as in `evaluation_batches`.

    Args:
        train: documents that are counted.
        heldout: documents that are scored.
        vocab_size: number of different tokens.
        max_tokens: of the held-out documents, as in `EvalConfig`.
        max_train_tokens: of larger training sets, only every n-th document is counted.

    Returns:
        The sum, in nats.
    """
    every = math.ceil(train.num_tokens / max_train_tokens) or 1
    counts = _token_counts(train, range(0, train.num_documents, every), vocab_size)
    scored = _token_counts(heldout, range(num_selected(heldout, max_tokens)), vocab_size)
    log_p = np.log(counts + 1.0) - math.log(counts.sum() + vocab_size)
    return float(-(scored * log_p).sum())


def _token_counts(documents: Documents, indices: range, vocab_size: int) -> np.ndarray:
    """Counts tokens; `bincount` of each document would cost a vocabulary's length every time."""
    counts = np.zeros(vocab_size, np.int64)
    for index in indices:
        np.add.at(counts, documents.tokens(index)[documents.counts(index)], 1)
    return counts
