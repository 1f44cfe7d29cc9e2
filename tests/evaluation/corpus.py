"""Held-out documents in memory, and models simple enough to compute by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mixtral_jax.evaluation.scoring import TokenScores

BOS, EOS = 1, 2


@dataclass(frozen=True)
class Corpus:
    texts: Sequence[Sequence[int]]  # tokens without start and end sign
    sizes: Sequence[int] = ()  # bytes; twice the tokens if empty
    name: str = "made-up"
    format: str = "text"

    @property
    def num_documents(self) -> int:
        return len(self.texts)

    @property
    def num_tokens(self) -> int:
        return sum(len(text) + 2 for text in self.texts)

    def tokens(self, index: int) -> np.ndarray:
        return np.array([BOS, *self.texts[index], EOS], np.uint16)

    def counts(self, index: int) -> np.ndarray:
        return np.arange(len(self.texts[index]) + 2) > 0

    def num_bytes(self, index: int) -> int:
        return self.sizes[index] if self.sizes else 2 * len(self.texts[index])


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
