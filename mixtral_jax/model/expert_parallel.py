"""How the tokens of an expert group meet the experts: what one device runs, the same numbers from each exchange.

A group is the devices along the mesh axis `expert`; each has its own tokens and its own experts. `gather` brings all
tokens of the group to every device; `ragged` and `padded` send each assignment's row to its expert and its result back.
A layer is `gather_tokens`, `dispatch`, `exchange`, the experts, `exchange_back`, `combine`, `scatter_sums`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.exchange import (
    AXIS,
    Slices,
    block_exchange,
    expert_slices,
    ragged_exchange,
    sort_arrivals,
)
from mixtral_jax.kernels.permutation import GATHERS, RowMover, combine_rows, dispatch_rows, pad_groups
from mixtral_jax.model.routing import RowPlan, capacity_plan, dropless_plan
from mixtral_jax.precision import FULL
from mixtral_jax.remat import save_for_backward
from mixtral_jax.zigzag import chunk_starts, in_order


@dataclass(frozen=True)
class ExpertGroup:
    """The devices that share the experts, and how much room each has."""

    num_experts: int  # of the group
    devices: int
    exchange: str
    quota: int  # assignments that a device may have for one device of the group; at most so many there are
    row_multiple: int = 1  # every expert's rows begin at a multiple of it; more than 1 without other devices alone
    capacity: int | None = None  # assignments of a sequence to an expert, in buffers of one size; None: as many as come
    mover: RowMover = GATHERS  # of tokens to rows and back

    @property
    def local_experts(self) -> int:
        """Experts of one device."""
        return self.num_experts // self.devices

    @property
    def gathers(self) -> bool:
        """Whether tokens move, and not rows."""
        return self.devices > 1 and self.exchange == "gather"


class RoutedTokens(NamedTuple):
    """Tokens and where they go."""

    x: Float[Array, "batch seq d_model"]
    experts: Int[Array, "batch seq k"]  # of the group; its number of experts marks an assignment that nobody computes
    weights: Float[Array, "batch seq k"]


class RoutedRows(NamedTuple):
    """Rows sorted by expert, and what brings them to the experts and back to their tokens."""

    rows: Float[Array, "rows d_model"]
    group_sizes: Int[Array, " experts"]  # rows of each expert
    plan: RowPlan  # between rows and assignments on the device of the tokens
    weights: Float[Array, "tokens k"]
    slices: tuple[Slices, Slices] | None = None  # `ragged`: there and back
    order: tuple[Int[Array, " rows"], Int[Array, " rows"]] | None = None  # `padded`: arrived row of each, and inverse


def gather_tokens(tokens: RoutedTokens, group: ExpertGroup) -> RoutedTokens:
    """Where tokens move: brings those of the group to this device, and keeps what its own experts compute."""
    if not group.gathers:
        return tokens
    x, experts, weights = (jax.lax.all_gather(a, AXIS, axis=0, tiled=True) for a in tokens)
    mine = experts - jax.lax.axis_index(AXIS) * group.local_experts
    return RoutedTokens(x, jnp.where((mine >= 0) & (mine < group.local_experts), mine, group.local_experts), weights)


def dispatch(tokens: RoutedTokens, group: ExpertGroup) -> RoutedRows:
    """Makes a row of every assignment, sorted by expert."""
    here = group.local_experts if group.gathers else group.num_experts
    x, experts, weights = (a.reshape(-1, a.shape[-1]) for a in tokens)
    if group.capacity is not None:
        plan = capacity_plan(tokens.experts, here, group.capacity)
    else:
        plan = dropless_plan(experts, here, group.devices * group.quota if group.gathers else experts.size)
    if group.devices > 1 and group.exchange == "padded" and group.capacity is None:
        plan = in_blocks(plan, group.devices, group.quota)
    if group.row_multiple > 1:
        plan = at_multiples(plan, group.row_multiple)
    plan = save_for_backward(plan)
    rows = dispatch_rows(x, plan.source, plan.row_of, group.mover)
    return RoutedRows(rows, plan.group_sizes, plan, weights)


def exchange(sent: RoutedRows, group: ExpertGroup) -> RoutedRows:
    """Brings every row to the device of its expert, sorted by its experts."""
    if group.devices == 1 or group.gathers:
        return sent
    if group.capacity is not None:  # rows are [device, its expert, row], and arrive as [source, expert, row]
        rows = _swap(block_exchange(sent.rows), group.devices, group.local_experts)
        return sent._replace(rows=rows, group_sizes=group.devices * sent.group_sizes[: group.local_experts])
    me = jax.lax.axis_index(AXIS)
    counts = jax.lax.all_gather(sent.plan.group_sizes, AXIS)
    arriving = jax.lax.dynamic_slice_in_dim(counts, me * group.local_experts, group.local_experts, axis=1)
    sizes = jnp.sum(arriving, axis=0)
    if group.exchange == "ragged":
        there, back = expert_slices(counts, me)
        rows = ragged_exchange(sent.rows, there, back, group.devices * group.quota)
        return sent._replace(rows=rows, group_sizes=sizes, slices=(there, back))
    slot_of_row, row_of_slot = sort_arrivals(arriving, group.quota)
    rows = dispatch_rows(block_exchange(sent.rows), slot_of_row, row_of_slot[:, None])
    return sent._replace(rows=rows, group_sizes=sizes, order=(slot_of_row, row_of_slot))


def exchange_back(results: RoutedRows, group: ExpertGroup) -> RoutedRows:
    """Brings every result to the device and the place that its row came from."""
    rows = results.rows
    if results.slices is not None:
        there, back = results.slices
        rows = ragged_exchange(rows, back, there, results.plan.row_of.size)
    elif results.order is not None:
        slot_of_row, row_of_slot = results.order
        rows = block_exchange(dispatch_rows(rows, row_of_slot, slot_of_row[:, None]))
    elif group.devices > 1 and not group.gathers:
        rows = block_exchange(_swap(rows, group.local_experts, group.devices))
    return results._replace(rows=rows)


def combine(returned: RoutedRows, group: ExpertGroup) -> Float[Array, "tokens d_model"]:
    """Sums the weighted results of each token."""
    return combine_rows(returned.rows, returned.weights, returned.plan.source, returned.plan.row_of, group.mover)


def scatter_sums(y: Float[Array, "tokens d_model"], group: ExpertGroup) -> Float[Array, "own_tokens d_model"]:
    """Where tokens moved: adds up what the devices computed of each, and brings it back to its device."""
    return jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True) if group.gathers else y


def count_dropped(tokens: RoutedTokens, rows: RoutedRows, group: ExpertGroup) -> Float[Array, ""]:
    """Counts assignments to this device's choice of experts for which buffers of one size had no room."""
    here = group.local_experts if group.gathers else group.num_experts
    plan = rows.plan
    wanted = (tokens.experts < here).reshape(plan.row_of.shape)
    return jnp.sum(wanted & (plan.row_of >= plan.source.size), dtype=FULL)


def drop_beyond_capacity(
    experts: Int[Array, "batch seq k"], num_experts: int, shares: int, capacity: int
) -> Int[Array, "batch seq k"]:
    """Keeps what `capacity_plan` would keep of whole sequences, where `context` splits them; marks the others.

    Args:
        experts: of this device's columns, see `zigzag`; `num_experts` marks an assignment that nobody computes.
        num_experts: experts of the group.
        shares: devices that share a sequence.
        capacity: assignments of a sequence to an expert.
    """
    chunks = experts.reshape(experts.shape[0], 2, -1)
    hits = (chunks[..., None] == jnp.arange(num_experts)).astype(jnp.int32)
    counts = in_order(jax.lax.all_gather(jnp.sum(hits, axis=2), "context", axis=1, tiled=True), shares)
    mine = chunk_starts(2 * shares, shares, jax.lax.axis_index("context"))
    before = jnp.take(jnp.cumsum(counts, axis=1) - counts, mine, axis=1)
    earlier = jnp.sum((before[:, :, None] + jnp.cumsum(hits, axis=2) - 1) * hits, axis=-1)
    return jnp.where(earlier < capacity, chunks, num_experts).reshape(experts.shape)


def in_blocks(plan: RowPlan, devices: int, block: int) -> RowPlan:
    """Moves the rows of every device to the beginning of a block of their own."""
    tokens, k = plan.row_of.shape
    sizes = jnp.sum(plan.group_sizes.reshape(devices, -1), axis=1)
    ends = jnp.cumsum(sizes)
    device = jnp.searchsorted(ends, plan.row_of, side="right")  # `devices` for what is sent nowhere
    begins = jnp.append(ends - sizes, 0)
    row_of = jnp.where(device < devices, device * block + plan.row_of - begins[device], devices * block)
    row = jnp.arange(devices * block, dtype=jnp.int32)
    filled = row % block < sizes[row // block]
    sorted_row = jnp.where(filled, begins[row // block] + row % block, 0)
    source = jnp.where(filled, plan.source[sorted_row], tokens * k).astype(jnp.int32)
    return RowPlan(source, row_of.astype(jnp.int32), plan.group_sizes)


def at_multiples(plan: RowPlan, row_multiple: int) -> RowPlan:
    """Moves every expert's rows to a multiple of `row_multiple`, and counts its padding as its rows."""
    padding = pad_groups(plan.group_sizes, plan.source.size, row_multiple)
    nobody = plan.row_of.size
    source = jnp.take(plan.source, padding.source, mode="fill", fill_value=nobody)
    row_of = jnp.take(padding.place, plan.row_of, mode="fill", fill_value=source.size)
    return RowPlan(source, row_of, padding.sizes)


def _swap(rows: Array, first: int, second: int) -> Array:
    return rows.reshape(first, second, -1, rows.shape[-1]).swapaxes(0, 1).reshape(rows.shape)
