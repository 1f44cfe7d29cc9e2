"""Which experts a model chooses: shares, repetitions between neighbours, load of each batch.

Source: arXiv 2401.04088, section 5 (figure 7 and table 5).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer

from mixtral_jax.config import EvalConfig, UserError
from mixtral_jax.evaluation.scoring import Route
from mixtral_jax.evaluation.windows import Documents, empty_batch, evaluation_batches, num_batches

Decode = Callable[[np.ndarray], str]

SAMPLE_TOKENS = 400  # of each source, on the page of coloured text


@dataclass(frozen=True)
class RoutingCounts:
    """Counts over the tokens of one source; padding is no token, and neighbours are of one document."""

    tokens: int
    pairs: int  # of neighbouring tokens
    assignments: Int64[np.ndarray, "k layers experts"]  # by choice, best first
    same_first: Int64[np.ndarray, " layers"]  # pairs whose first choice is the same
    overlap: Int64[np.ndarray, " layers"]  # pairs that have any of their k experts in common
    batch_loads: Float64[np.ndarray, "batches layers experts"]  # share of the assignments of each batch

    def shares(self, choice: int | None = None) -> Float64[np.ndarray, "layers experts"]:
        """Each expert's share of the assignments: of one choice, 0 being the first, or of all."""
        counts = self.assignments.sum(axis=0) if choice is None else self.assignments[choice]
        return counts / counts.sum(axis=-1, keepdims=True)

    def first_repeats(self) -> Float64[np.ndarray, " layers"]:
        """Share of the pairs whose first choice is the same."""
        return self.same_first / max(1, self.pairs)

    def any_repeats(self) -> Float64[np.ndarray, " layers"]:
        """Share of the pairs that have an expert in common."""
        return self.overlap / max(1, self.pairs)

    def batch_violations(self) -> Float64[np.ndarray, "batches layers"]:
        """How far the busiest expert of each batch is above the uniform load: 0 at balance, E - 1 at worst."""
        return self.batch_loads.max(axis=-1) * self.batch_loads.shape[-1] - 1


def random_repeats(num_experts: int, k: int) -> tuple[float, float]:
    """Computes what `first_repeats` and `any_repeats` would be if experts were drawn at random.

    1 / E, and 1 - C(E - k, k) / C(E, k): 12.5% and 46.4% for 2 of 8.
    """
    return 1 / num_experts, 1 - math.comb(num_experts - k, k) / math.comb(num_experts, k)


def count_routes(
    experts: Integer[np.ndarray, "rows context layers k"], segment_ids: Integer[np.ndarray, "rows context"],
    num_experts: int,
) -> RoutingCounts:  # fmt: skip
    """Counts one batch.

    Args:
        experts: chosen experts, best first.
        segment_ids: equal for neighbours in one document; 0 is padding.
        num_experts: of every layer.
    """
    valid = segment_ids > 0
    layers, k = experts.shape[2:]
    chosen = experts[valid].astype(np.int64) + num_experts * np.arange(layers)[:, None]
    assignments = np.stack(
        [np.bincount(chosen[..., i].ravel(), minlength=layers * num_experts) for i in range(k)]
    ).reshape(k, layers, num_experts)
    neighbours = valid[:, 1:] & (segment_ids[:, 1:] == segment_ids[:, :-1])
    left, right = experts[:, :-1][neighbours], experts[:, 1:][neighbours]
    total = assignments.sum(axis=0)
    return RoutingCounts(
        tokens=int(valid.sum()),
        pairs=int(neighbours.sum()),
        assignments=assignments,
        same_first=(left[..., 0] == right[..., 0]).sum(axis=0),
        overlap=(left[..., :, None] == right[..., None, :]).any(axis=(-1, -2)).sum(axis=0),
        batch_loads=(total / np.maximum(total.sum(axis=-1, keepdims=True), 1))[None],
    )


def measure_routing(
    route: Route,
    documents: Documents,
    eval: EvalConfig,
    seq_len: int,
    num_experts: int,
    on_batch: Callable[[int], None] | None = None,
) -> RoutingCounts:
    """Counts the routes of one source, cut as for perplexity.

    Args:
        route: see `Route`.
        documents: the text.
        eval: how to cut it and how many tokens to take.
        seq_len: tokens of a training row.
        num_experts: of every layer.
        on_batch: called after each batch with the number of batches done.

    Raises:
        UserError: the source has no text.
    """
    counts = []
    for done, batch in enumerate(evaluation_batches(documents, eval, seq_len), 1):
        counts.append(count_routes(route(batch), batch.segment_ids, num_experts))
        if on_batch is not None:
            on_batch(done)
    if not counts:
        raise UserError(
            f"source '{documents.name}' has no held-out text: raise data.holdout or give the source more documents"
        )
    return RoutingCounts(
        tokens=sum(part.tokens for part in counts),
        pairs=sum(part.pairs for part in counts),
        assignments=np.sum([part.assignments for part in counts], axis=0),
        same_first=np.sum([part.same_first for part in counts], axis=0),
        overlap=np.sum([part.overlap for part in counts], axis=0),
        batch_loads=np.concatenate([part.batch_loads for part in counts]),
    )


@dataclass(frozen=True)
class RoutedText:
    """A stretch of text and where each of its tokens went."""

    name: str
    pieces: list[str]  # text of each token; together they are the text
    experts: Integer[np.ndarray, "tokens layers k"]


def route_sample(route: Route, documents: Documents, decode: Decode, length: int) -> RoutedText:
    """Routes the begin of a source's first document that is long enough, or of its longest.

    Args:
        route: see `Route`.
        documents: the source.
        decode: turns tokens into text.
        length: tokens of the row; of them at most `SAMPLE_TOKENS` are shown.
    """
    sizes = [len(documents.tokens(index)) for index in range(min(documents.num_documents, 1000))]
    wanted = min(length, SAMPLE_TOKENS)
    index = next((i for i, size in enumerate(sizes) if size >= wanted), int(np.argmax(sizes)))
    tokens = documents.tokens(index)[:wanted]
    batch = empty_batch(1, length)
    batch.tokens[0, : len(tokens)] = tokens
    batch.segment_ids[0, : len(tokens)] = 1
    batch.positions[0, : len(tokens)] = np.arange(len(tokens))
    return RoutedText(documents.name, decode_pieces(decode, tokens), route(batch)[0, : len(tokens)])


def decode_pieces(decode: Decode, tokens: Integer[np.ndarray, " tokens"]) -> list[str]:
    """Gives each token its part of the decoded text; the last token of a character of several gets all of it."""
    pieces, written = [], 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        part = text[written:]
        if part.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):  # a character that is not yet whole
            part = ""
        pieces.append(part)
        written += len(part)
    return pieces


def routing_batches(texts: Sequence[Documents], eval: EvalConfig, seq_len: int) -> int:
    """Counts the batches of all sources, for a progress bar."""
    return sum(num_batches(documents, eval, seq_len) for documents in texts)
