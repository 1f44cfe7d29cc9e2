"""Scores many short texts at once: packed into rows of a few fixed lengths, so that few programs are compiled."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mixtral_jax.config import UserError
from mixtral_jax.console import ProgressLine, silent
from mixtral_jax.evaluation.loading import LoadedModel
from mixtral_jax.evaluation.perplexity import finite_nats
from mixtral_jax.evaluation.scoring import Score
from mixtral_jax.evaluation.windows import EvaluationBatch, Window, batch_of

SHORTEST_ROW = 64  # tokens
GROWTH = 4  # from one row length to the next


@dataclass(frozen=True)
class Request:
    """A text of which the end is to be scored."""

    tokens: Sequence[int]  # the whole text, from the start sign or the first token that is seen
    scored_from: int  # place of the first token to score, at least 1


@dataclass(frozen=True)
class Answer:
    """What the model says of the scored end."""

    nats: float  # the sum of -log p
    greedy: bool  # greedy decoding would write the same


@dataclass(frozen=True)
class RowPlan:
    """Which requests share a row, by their numbers; all batches of a length have one shape."""

    length: int  # tokens
    requests: list[int]


def row_lengths(context: int, multiple: int = 1) -> list[int]:
    """Lists the lengths of rows: 64, 256, 1024 and so on below the context, and the context.

    Args:
        context: the longest row, tokens.
        multiple: what each must be a multiple of, because that many devices share a row.
    """
    lengths = []
    length = SHORTEST_ROW
    while length < context:
        lengths.append(length + -length % multiple)
        length *= GROWTH
    return sorted({*(length for length in lengths if length < context), context})


def plan_rows(sizes: Sequence[int], lengths: Sequence[int], *, share: bool = True) -> list[RowPlan]:
    """Puts requests into rows, the longest first, each into the fullest row that has room.

    Args:
        sizes: input tokens of each request.
        lengths: allowed lengths of a row, ascending.
        share: whether a row may hold several requests.

    Returns:
        Rows, the longest first. A row is as short as its longest request allows.
    """
    rows: list[RowPlan] = []
    rooms: list[tuple[int, int]] = []  # (room, row), ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        place = bisect.bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            row, room = len(rows), lengths[bisect.bisect_left(lengths, size)]
            rows.append(RowPlan(room, []))
        rows[row].requests.append(index)
        if share:
            bisect.insort(rooms, (room - size, row))
    return rows


def score_requests(
    score: Score,
    requests: Sequence[Request],
    lengths: Sequence[int],
    batch_tokens: int,
    *,
    share_rows: bool = True,
    what: str = "the requests",
    on_batch: Callable[[str, int], None] = silent,
) -> list[Answer]:
    """Scores requests; each sees itself alone.

    Args:
        score: see `Score`; attention must stop at segments.
        requests: in any order.
        lengths: see `row_lengths`.
        batch_tokens: of a batch; at least one row.
        share_rows: False where tokens of a row compete for experts (dispatch=capacity).
        what: names the requests in an error.
        on_batch: called after each batch with no words and the number of its requests.

    Returns:
        An answer for each request, in their order.

    Raises:
        UserError: a request is longer than the longest row, or a score is not finite.
    """
    sizes = [len(request.tokens) - 1 for request in requests]
    if max(sizes, default=0) > lengths[-1]:
        raise UserError(
            f"{what}: one is {max(sizes):,} tokens long and the context is {lengths[-1]:,}: raise eval.context"
        )
    nats = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    for number, (batch, members) in enumerate(_batches(requests, plan_rows(sizes, lengths, share=share_rows),
                                                       batch_tokens), 1):  # fmt: skip
        scores = score(batch)
        mask = batch.loss_mask
        values = finite_nats(scores.nats, mask, what, f"batch {number}")
        which = batch.documents[mask]
        nats += np.bincount(which, weights=values, minlength=len(requests))
        greedy[which[~scores.greedy[mask]]] = False
        on_batch("", members)
    return [Answer(float(a), bool(b)) for a, b in zip(nats, greedy, strict=True)]


def answer(loaded: LoadedModel, requests: Sequence[Request], context: int, title: str, what: str) -> list[Answer]:
    """Scores requests on a loaded model with a progress bar.

    Args:
        loaded: with `packed=False`.
        requests: in any order.
        context: tokens of the longest row.
        title: of the progress bar.
        what: names the requests in an error.

    Raises:
        UserError: what `score_requests` raises.
    """
    with ProgressLine(title, len(requests), plain_line_seconds=30.0) as progress:
        return score_requests(
            loaded.score,
            requests,
            row_lengths(context, loaded.row_multiple),
            loaded.batch_tokens,
            share_rows=loaded.config.model.dispatch != "capacity",
            what=what,
            on_batch=progress.add,
        )


def _batches(
    requests: Sequence[Request], rows: Sequence[RowPlan], batch_tokens: int
) -> Iterator[tuple[EvaluationBatch, int]]:
    """Yields batches as `evaluation_batches` does, `documents` being the requests' numbers, and their requests."""
    start = 0
    while start < len(rows):
        length = rows[start].length
        per_batch = max(1, batch_tokens // length)
        end = start
        while end < len(rows) and end - start < per_batch and rows[end].length == length:
            end += 1
        while per_batch // GROWTH >= end - start:  # a rest need not be computed as a whole batch
            per_batch //= GROWTH
        windows = [[_window(index, requests[index]) for index in plan.requests] for plan in rows[start:end]]
        yield batch_of(windows, per_batch, length), sum(map(len, windows))
        start = end


def _window(index: int, request: Request) -> Window:
    size = len(request.tokens)
    return Window(index, np.array(request.tokens), np.arange(size) >= request.scored_from, size - 1)
