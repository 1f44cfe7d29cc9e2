"""Which expert rows exist: pure index arithmetic from the chosen experts to rows and back."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.precision import EXACT_PRODUCT
from mixtral_jax.remat import save_for_backward


class RowPlan(NamedTuple):
    """Maps between assignments (token * k + choice) and rows sorted by expert."""

    source: Int[Array, " rows"]  # assignment of each row; tokens * k: empty
    row_of: Int[Array, "tokens k"]  # row of each assignment; the number of rows: none
    group_sizes: Int[Array, " experts"]  # rows of each expert


def router_init_std(config: ModelConfig) -> float:
    """Standard deviation of a router's weights at birth: that of the others up to d_model 256, then as 1 / d_model.

    With that of the others at 4096 its logits begin at 0.64 and choose before anything is learnt, see docs/learning.md.
    Source: the rule for outputs in arXiv 2203.03466.
    """
    return config.init_std * min(1, 256 / config.d_model)


def choose_experts(
    router_logits: Float[Array, "*batch experts"], selection_bias: Float[Array, " experts"], k: int
) -> tuple[Int[Array, "*batch k"], Float[Array, "*batch k"]]:
    """Picks the top k experts and weighs them by a softmax over the kept logits.

    Args:
        router_logits: of each token, float32.
        selection_bias: added to the router's probabilities for the choice alone, never to the weights.
        k: experts per token.

    Returns:
        expert_indices, best first, and expert_weights that sum to 1.

    Source: arXiv 2401.04088 §2.1; arXiv 2408.15664 for the bias.
    """
    scores = jax.nn.softmax(router_logits, axis=-1) + selection_bias
    indices = save_for_backward(jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1])
    # A sum over a one-hot instead of a gather: its backward pass is a product, not a scatter-add.
    chosen = jax.nn.one_hot(indices, router_logits.shape[-1], dtype=router_logits.dtype)
    kept = jnp.einsum("...ke,...e->...k", chosen, router_logits, precision=EXACT_PRODUCT)
    return indices, jax.nn.softmax(kept, axis=-1)


def dropless_plan(experts: Int[Array, "tokens k"], num_experts: int, num_rows: int) -> RowPlan:
    """Sorts all assignments by expert.

    Args:
        experts: chosen experts; `num_experts` marks an assignment that this device does not compute.
        num_experts: experts of this device.
        num_rows: size of the row buffer; at least the number of assignments that can arrive.
    """
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    place = jnp.argsort(order).astype(jnp.int32)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    used = jnp.sum(group_sizes)
    source = jnp.where(jnp.arange(num_rows) < used, order[:num_rows], flat.size).astype(jnp.int32)
    row_of = jnp.where(place < used, place, num_rows)
    return RowPlan(source, row_of.reshape(experts.shape), group_sizes)


def device_quota(tokens: int, k: int, num_experts: int, devices: int, factor: float) -> int:
    """Rows that one device may send to one of the `devices` devices that share the experts.

    Args:
        tokens: of the sending device.
        k: experts per token.
        num_experts: of all devices together.
        devices: that share the experts.
        factor: multiple of the balanced load, tokens * k / devices; 0: the worst case, nothing is dropped.
    """
    worst = tokens * min(k, num_experts // devices)
    return min(worst, math.ceil(factor * tokens * k / devices)) if factor else worst


def drop_beyond_quota(
    experts: Int[Array, "batch seq k"], num_experts: int, devices: int, quota: int
) -> Int[Array, "batch seq k"]:
    """Keeps the first `quota` assignments to each device and marks the others with `num_experts`.

    First are the earlier positions, of all sequences alike, so that no token depends on a later one of its sequence.
    What other devices send has no part in it, so every exchange drops the same assignments.
    """
    batch, seq_len, k = experts.shape
    in_order = experts.swapaxes(0, 1).reshape(-1)
    hits = (in_order // (num_experts // devices))[:, None] == jnp.arange(devices)
    earlier = jnp.sum((jnp.cumsum(hits, axis=0) - 1) * hits, axis=-1)
    kept = jnp.where(earlier < quota, in_order, num_experts)
    return kept.reshape(seq_len, batch, k).swapaxes(0, 1)


def expert_capacity(seq_len: int, k: int, num_experts: int, factor: float) -> int:
    """Rows of one expert's buffer for one sequence: factor times the balanced load, at most the sequence length."""
    return min(seq_len, max(1, math.ceil(factor * seq_len * k / num_experts)))


def capacity_plan(experts: Int[Array, "batch seq k"], num_experts: int, capacity: int) -> RowPlan:
    """Gives every expert `capacity` rows in every sequence; later assignments of a full expert are dropped.

    Earlier tokens come first, so that no token's output depends on a later one. Counting by sequence makes the
    result independent of how sequences are spread over devices and microbatches.

    Args:
        experts: chosen experts; `num_experts` marks an assignment that this device does not compute.
        num_experts: experts of this device.
        capacity: rows of an expert in a sequence.
    """
    batch, seq_len, k = experts.shape
    flat = experts.reshape(batch, seq_len * k)
    hits = flat[..., None] == jnp.arange(num_experts)
    earlier = jnp.sum((jnp.cumsum(hits, axis=1) - 1) * hits, axis=-1)
    num_rows = num_experts * batch * capacity
    row = (flat * batch + jnp.arange(batch)[:, None]) * capacity + earlier
    row = jnp.where((flat < num_experts) & (earlier < capacity), row, num_rows).reshape(-1).astype(jnp.int32)
    assignments = jnp.arange(row.size, dtype=jnp.int32)
    source = jnp.full((num_rows,), row.size, jnp.int32).at[row].set(assignments, mode="drop", unique_indices=False)
    group_sizes = jnp.full((num_experts,), batch * capacity, jnp.int32)
    return RowPlan(source, row.reshape(batch * seq_len, k), group_sizes)
