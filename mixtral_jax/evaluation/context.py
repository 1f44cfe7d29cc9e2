"""What more context is worth: the same targets after contexts of growing length, and the loss at every position.

Source: arXiv 2401.04088, figure 4 (perplexity over the context length).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64
from rich.table import Table

from mixtral_jax.config import UserError
from mixtral_jax.console import make_table, silent, two_lines
from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.intervals import Interval, bootstrap_sums, interval
from mixtral_jax.evaluation.perplexity import finite_nats
from mixtral_jax.evaluation.results import interval_text
from mixtral_jax.evaluation.scoring import Score
from mixtral_jax.evaluation.windows import Window, batch_of

MOST_LENGTHS = 8  # each half of the one before, from eval.context down
SHORTEST = 16  # tokens
BINS = 20  # of positions, each longer than the one before by the same factor
TARGETS = 8  # one in so many tokens of a window, at its end, is scored after every context


@dataclass(frozen=True)
class ContextCurve:
    """Sums over windows of one source."""

    contexts: list[int]  # tokens, ascending
    targets: int  # scored after every context, per window: the last ones of the window
    nats: Float64[np.ndarray, "contexts windows"]  # of these targets
    nats_by_position: Float64[np.ndarray, " longest"]  # of all targets of the whole windows, summed over windows

    @property
    def windows(self) -> int:
        """Stretches of the longest context, end to end, that the documents hold."""
        return self.nats.shape[1]

    def nats_per_token(self) -> Float64[np.ndarray, " contexts"]:
        """Mean loss of the targets after each context."""
        return self.nats.sum(axis=1) / (self.windows * self.targets)

    def intervals(self) -> list[Interval | None]:
        """Draws windows anew."""
        sums = bootstrap_sums([self.nats.T])
        if sums is None:
            return [None] * len(self.contexts)
        return [interval(column / (self.windows * self.targets)) for column in sums.T]

    def by_position(self) -> list[tuple[int, int, float]]:
        """Mean loss in bins that grow by a factor: first and last number of tokens seen, nats per token."""
        edges = sorted({int(edge) for edge in np.geomspace(1, len(self.nats_by_position) + 1, BINS)})
        return [
            (begin, end - 1, float(self.nats_by_position[begin - 1 : end - 1].sum() / ((end - begin) * self.windows)))
            for begin, end in pairwise(edges)
        ]


def context_lengths(context: int, multiple: int = 1) -> list[int]:
    """Lists the lengths to compare: the context, its half and so on, ascending.

    Args:
        context: the longest, tokens.
        multiple: what each must be a multiple of, because that many devices share a row.

    Raises:
        UserError: there is nothing to compare.
    """
    lengths: list[int] = []
    length = context
    while length >= SHORTEST and len(lengths) < MOST_LENGTHS:
        lengths.append(length)
        length = length // 2 - length // 2 % multiple
    if len(lengths) < 2:
        raise UserError(f"eval.context={context} leaves no shorter context to compare: raise it to {2 * SHORTEST}")
    return lengths[::-1]


def num_windows(documents: Documents, context: int, max_tokens: int) -> int:
    """Counts the windows of a source; 0 for `max_tokens`: all."""
    return sum(1 for _ in _windows(documents, context, max_tokens))


def measure_contexts(
    score: Score,
    documents: Documents,
    contexts: Sequence[int],
    batch_tokens: int,
    max_tokens: int = 0,
    on_windows: Callable[[str, int], None] = silent,
) -> ContextCurve:
    """Scores the last targets of every window after each of several contexts.

    A window is a stretch of the longest context within one document. Its last eighth are the targets. With a context of
    L tokens each is scored after at least L/2 and at most L of the tokens before it; where L is short, that takes
    several stretches. So every length is measured on the same targets, and only what is seen before them differs.

    Args:
        score: see `Score`.
        documents: one source.
        contexts: see `context_lengths`.
        batch_tokens: of a batch; at least one row.
        max_tokens: stops taking windows when they hold so many tokens; 0: all.
        on_windows: called with the source's name and how many more windows are done, each once for every context.

    Raises:
        UserError: no document is long enough, or a score is not finite.
    """
    longest = contexts[-1]
    targets = max(1, longest // TARGETS)
    windows = num_windows(documents, longest, max_tokens)
    if not windows:
        most = max((len(documents.tokens(index)) - 1 for index in range(documents.num_documents)), default=0)
        raise UserError(
            f"source '{documents.name}' has no held-out document of {longest:,} tokens, the longest has {most:,}: "
            "lower eval.context or choose a source with longer documents"
        )
    nats = np.zeros((len(contexts), windows))
    by_position = np.zeros(longest)
    for number, context in enumerate(contexts):
        stretches = _stretches(_windows(documents, longest, max_tokens), context, targets)
        rows = max(1, batch_tokens // context)
        done = 0
        while chosen := list(islice(stretches, rows)):
            batch = batch_of([[stretch] for stretch in chosen], rows, context)
            if context == longest:
                batch.loss_mask[: len(chosen)] = True  # for the curve over positions
            scores = score(batch).nats
            finite_nats(scores, batch.loss_mask, f"source '{documents.name}'", f"a window of {context:,} tokens")
            for row, stretch in enumerate(chosen):
                values = scores[row].astype(np.float64)
                nats[number, stretch.index] += values[stretch.counts[1:]].sum()
                if context == longest:
                    by_position += values
            on_windows(documents.name, chosen[-1].index + 1 - done)
            done = chosen[-1].index + 1
    return ContextCurve(list(contexts), targets, nats, by_position)


def context_table(curves: Mapping[str, ContextCurve]) -> Table:
    """Makes a table: a row for each context, nats per token of each source, with intervals over windows."""
    first = next(iter(curves.values()))
    named = [two_lines(name, f"{curve.windows:,} windows") for name, curve in curves.items()]
    caption = f"nats per token of the last {first.targets:,} targets of each window of {first.contexts[-1]:,} tokens"
    table = make_table((), ["context", *named], caption)
    columns = [list(zip(curve.nats_per_token(), curve.intervals(), strict=True)) for curve in curves.values()]
    for row, context in enumerate(first.contexts):
        cells = [two_lines(f"{column[row][0]:.4f}", interval_text(column[row][1], ".2f")) for column in columns]
        table.add_row(f"{context:,}", *cells)
    return table


def context_json(curves: Mapping[str, ContextCurve]) -> dict[str, Any]:
    """Makes `sources`: by name, `windows`, `targets` of each, and the losses `by_context` and `by_position`."""
    sources = {}
    for name, curve in curves.items():
        by_context = zip(curve.contexts, curve.nats_per_token().tolist(), curve.intervals(), strict=True)
        sources[name] = {
            "windows": curve.windows,
            "targets": curve.targets,
            "by_context": [
                {"context": context, "nats_per_token": nats, "perplexity": math.exp(nats), "interval": bounds}
                for context, nats, bounds in by_context
            ],
            "by_position": [
                {"first": first, "last": last, "nats_per_token": nats} for first, last, nats in curve.by_position()
            ],
        }
    return {"evaluation": "context", "sources": sources}


def _windows(documents: Documents, context: int, max_tokens: int) -> Iterator[np.ndarray]:
    """Yields stretches of context + 1 tokens, each beginning with the last token of the one before it."""
    taken = 0
    for index in range(documents.num_documents):
        document = documents.tokens(index)
        for begin in range(0, len(document) - context, context):
            if max_tokens and taken >= max_tokens:
                return
            yield document[begin : begin + context + 1]
            taken += context


def _stretches(windows: Iterator[np.ndarray], context: int, targets: int) -> Iterator[Window]:
    """Covers the last targets of each window, the last stretch first; each scores at most half of its context.

    What the model sees is a stretch; the number in it is that of the window.
    """
    each = min(targets, context // 2)
    for number, window in enumerate(windows):
        for left in range(targets, 0, -each):
            end = len(window) - (targets - left)
            asked = np.arange(context + 1) > context - min(each, left)
            yield Window(number, window[end - context - 1 : end], asked, context)
