"""Routing through training: how soon the routers choose as they do in the end, how sure they are, and the load."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer

from mixtral_jax.config import EvalConfig, ModelConfig
from mixtral_jax.console import silent
from mixtral_jax.data.batch import HostBatch
from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.routing import RoutingCounts, all_sources, measure_routing
from mixtral_jax.evaluation.scoring import Route, Routes


@dataclass(frozen=True)
class Moment:
    """The routers of one checkpoint, over all texts."""

    step: int
    saturation: Float64[np.ndarray, " layers"]  # 1 in the last checkpoint
    router_entropy: Float64[np.ndarray, " layers"]  # nats; ln E where routers know nothing
    shares: Float64[np.ndarray, "layers experts"]  # of the assignments


def agreement(
    chosen: Integer[np.ndarray, "tokens layers k"], others: Integer[np.ndarray, "tokens layers k"]
) -> Float64[np.ndarray, " layers"]:
    """Returns the mean over tokens of the share of the k experts that are the same, in any order."""
    return (chosen[..., :, None] == others[..., None, :]).any(axis=-1).mean(axis=(0, 2))


def measure_saturation(
    steps: Sequence[int],
    route_at: Callable[[int], Route],
    texts: Sequence[Documents],
    eval: EvalConfig,
    seq_len: int,
    model: ModelConfig,
    on_batch: Callable[[str], None] = silent,
) -> list[Moment]:
    """Routes the same texts with every checkpoint; the last one's choices stay in memory.

    Args:
        steps: of the checkpoints, ascending; the others are compared with the last.
        route_at: gives the routes of a step, the last one first.
        texts: one entry a source.
        eval: how to cut them and how many tokens to take of each.
        seq_len: tokens of a training row.
        model: of which they are.
        on_batch: called after each batch with what is being measured.

    Returns:
        The checkpoints by step.

    Source: arXiv 2409.02060, section 5, router saturation.
    """

    def routed(step: int) -> tuple[RoutingCounts, list[np.ndarray]]:
        route, chosen = route_at(step), list[np.ndarray]()  # of each batch

        def keeping(batch: HostBatch) -> Routes:
            routes = route(batch)
            chosen.append(routes.experts[batch.segment_ids > 0])
            return routes

        said = lambda _: on_batch(f"step {step}")  # noqa: E731
        counts = [measure_routing(keeping, documents, eval, seq_len, model, said) for documents in texts]
        return all_sources(counts, model), chosen

    *earlier, last = steps
    counts, final = routed(last)
    moments = [Moment(last, np.ones(model.num_layers), counts.router_entropy(), counts.shares())]
    for step in earlier:
        counts, chosen = routed(step)
        agreed = [agreement(here, there) for here, there in zip(chosen, final, strict=True)]
        saturation = np.average(agreed, axis=0, weights=[len(batch) for batch in final])
        moments.append(Moment(step, saturation, counts.router_entropy(), counts.shares()))
    return sorted(moments, key=lambda moment: moment.step)
