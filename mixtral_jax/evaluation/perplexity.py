"""Perplexity of held-out text: sums first, one division at the end; and the two models that any must beat."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np

from mixtral_jax.config import EvalConfig, UserError
from mixtral_jax.evaluation.windows import Documents, evaluation_batches, num_batches, num_selected, window_sizes

# Scores a batch of `evaluation_batches`: the sum of -log p(target) over its loss_mask, in nats, and their number.
Score = Callable[[dict[str, np.ndarray]], tuple[SupportsFloat, SupportsFloat]]


MOST_NATS = 700.0  # per token; exp of more is infinite


@dataclass(frozen=True)
class Result:
    """Sums over whole documents, and what follows from them."""

    tokens: int  # predicted: all but the start signs
    bytes: int  # UTF-8, of the documents' text
    nats: float  # sum of -log p

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
    )


def measure(
    score: Score,
    sources: Sequence[Documents],
    eval: EvalConfig,
    seq_len: int,
    on_batch: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measures a model on every source.

    Args:
        score: sums of a batch; see `Score`.
        sources: held-out documents, one entry a source.
        eval: how to cut them and how many tokens to take of each.
        seq_len: tokens of a training row.
        on_batch: called after each batch with the source's name, its batches done and its batches in all.

    Returns:
        Sums of each source, over whole documents, in float64.

    Raises:
        UserError: a source has no text, or the model's score of it is not finite.
    """
    results = {}
    for documents in sources:
        size = _text_size(documents, eval)
        batches = num_batches(documents, eval, seq_len)
        nats, tokens = [], 0
        for done, batch in enumerate(evaluation_batches(documents, eval, seq_len), 1):
            batch_nats, batch_tokens = (float(number) for number in score(batch))
            expected = int(batch["loss_mask"].sum())
            if batch_tokens != expected:
                raise AssertionError(f"the score is over {batch_tokens:g} targets, the batch has {expected}")
            if not batch_nats <= MOST_NATS * expected:  # so written, it is also true of nan
                raise UserError(
                    f"the model's score of source '{documents.name}' is {batch_nats} in batch {done} of {batches}: "
                    "its parameters have diverged, so evaluate an earlier checkpoint"
                )
            nats.append(batch_nats)
            tokens += expected
            if on_batch is not None:
                on_batch(documents.name, done, batches)
        results[documents.name] = Result(tokens, size, math.fsum(nats))
    context, stride = window_sizes(eval, seq_len)
    return Evaluation(results, eval.mode, context, stride)


def _text_size(documents: Documents, eval: EvalConfig) -> int:
    size = sum(documents.num_bytes(index) for index in range(num_selected(documents, eval.max_tokens)))
    if not size:
        raise UserError(
            f"source '{documents.name}' has no held-out text: raise data.holdout or give the source more documents"
        )
    return size


def uniform_nats(heldout: Documents, vocab_size: int, max_tokens: int = 0) -> float:
    """Sums -log p of held-out tokens under a model that finds every token equally likely; see `unigram_nats`."""
    selected = range(num_selected(heldout, max_tokens))
    return sum(len(heldout.tokens(index)) - 1 for index in selected) * math.log(vocab_size)


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
    """Counts tokens, many documents at a time because each pass also costs a vocabulary's length."""
    counts = np.zeros(vocab_size, np.int64)
    pending: list[np.ndarray] = []
    size = 0
    for index in indices:
        pending.append(documents.tokens(index)[1:])
        size += len(pending[-1])
        if index == indices[-1] or size >= 2**20:
            counts += np.bincount(np.concatenate(pending).astype(np.int64), minlength=vocab_size)
            pending, size = [], 0
    return counts
