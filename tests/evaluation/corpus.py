"""Held-out documents in memory, and models simple enough to compute by hand."""

from collections.abc import Callable, Sequence

import numpy as np

from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.scoring import TokenScores

BOS, EOS = 1, 2


class Corpus(Documents):
    """Documents of given tokens."""

    def __init__(self, texts: Sequence[Sequence[int]], sizes: Sequence[int] = (), name: str = "made-up"):
        """Takes tokens without start and end sign, and bytes: twice the tokens if there are none."""
        buffer = np.array([token for text in texts for token in (BOS, *text, EOS)], np.uint16)
        offsets = np.append(0, np.cumsum([len(text) + 2 for text in texts])).astype(np.int64)
        counts = np.array(sizes or [2 * len(text) for text in texts], np.int64)
        super().__init__(name, buffer, offsets[:-1], offsets, counts, BOS, "made-up")
        object.__setattr__(self, "texts", texts)


def random_corpus(rng: np.random.Generator, documents: int, longest: int, vocab: int = 50) -> Corpus:
    lengths = rng.integers(0, longest + 1, documents)
    return Corpus([rng.integers(3, vocab, length).tolist() for length in lengths])


def history_nats(history: Sequence[int], target: int) -> float:
    """A made-up -log p that depends on every token of the history and on its length."""
    value = 0.0
    for position, token in enumerate(history):
        value = (value * 0.7 + token * (position + 1) + target) % 97
    return 1.0 + value / 10


def score_by_history(batch: dict[str, np.ndarray]) -> TokenScores:
    """Scores a batch as a model would that attends within its segment, up to the token itself."""
    nats = np.full(batch.tokens.shape, np.nan)  # what is not asked for must not be counted
    for row, column in zip(*np.nonzero(batch.loss_mask), strict=True):
        segment = batch.segment_ids[row]
        start = np.nonzero(segment == segment[column])[0][0]
        history = batch.tokens[row, start : column + 1].tolist()
        assert batch.positions[row, start : column + 1].tolist() == list(range(len(history)))
        nats[row, column] = history_nats(history, int(batch.targets[row, column]))
    return TokenScores(nats, nats < 0)


def constant(value: float) -> Callable[[dict[str, np.ndarray]], TokenScores]:
    """Scores every target alike."""
    return lambda batch: TokenScores(np.full(batch.tokens.shape, value), np.zeros(batch.tokens.shape, bool))
