"""How the tokens of an expert group meet the experts: the functions that one device runs, the same numbers from each.

A group is the devices along the mesh axis `expert`; each has its own tokens and its own experts. `gather` brings all
tokens of the group to every device; `ragged` and `padded` send each assignment's row to its expert and its result back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.exchange import AXIS, block_exchange, expert_slices, ragged_exchange, sort_arrivals
from mixtral_jax.kernels.permutation import collect_rows, combine_rows, dispatch_rows
from mixtral_jax.model.routing import RowPlan, capacity_plan, dropless_plan
from mixtral_jax.precision import FULL
from mixtral_jax.remat import keep
from mixtral_jax.runtime import Exchange
from mixtral_jax.zigzag import chunk_starts, in_order

# (rows sorted by expert, rows of each expert) -> one output a row: this device's experts. What is `weighted` takes each
# row's weight as a third argument and applies it itself.
RunExperts = Callable[..., Array]


def compute_dropless(
    x: Float[Array, "tokens d_model"],
    experts: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    run: RunExperts,
    *,
    num_experts: int,
    ways: int,
    quota: int,
    exchange: Exchange,
    weighted: bool = False,
) -> Float[Array, "tokens d_model"]:
    """Computes every assignment to an expert and sums the weighted results of each token.

    Args:
        x: activations of this device's tokens.
        experts: experts of the group, by number; `num_experts` marks an assignment that nobody computes.
        weights: of the choices.
        run: this device's experts.
        num_experts: experts of the group.
        ways: devices of the group.
        quota: assignments that this device may have for one device of the group; at most so many there are.
        exchange: see the module.
        weighted: see `RunExperts`; for one device.
    """
    tokens, k = experts.shape
    local, assignments = num_experts // ways, tokens * k
    if ways == 1:
        return _through(dropless_plan(experts, num_experts, assignments), x, weights, run, weighted)
    if exchange == "gather":
        x, experts, weights = (_gather(a) for a in (x, experts, weights))
        return _scatter(_through(dropless_plan(own_experts(experts, local), local, ways * quota), x, weights, run))

    plan = dropless_plan(experts, num_experts, assignments)
    me = jax.lax.axis_index(AXIS)
    counts = jax.lax.all_gather(plan.group_sizes, AXIS)
    arriving = jax.lax.dynamic_slice_in_dim(counts, me * local, local, axis=1)
    group_sizes = jnp.sum(arriving, axis=0)
    if exchange == "ragged":
        there, back = expert_slices(counts, me)
        rows = ragged_exchange(dispatch_rows(x, plan.source, plan.row_of), there, back, ways * quota)
        returned = ragged_exchange(run(rows, group_sizes), back, there, assignments)
        return combine_rows(returned, weights, plan.source, plan.row_of)

    plan = _in_blocks(plan, ways, quota)
    slot_of_row, row_of_slot = sort_arrivals(arriving, quota)
    arrived = block_exchange(dispatch_rows(x, plan.source, plan.row_of))
    results = run(dispatch_rows(arrived, slot_of_row, row_of_slot[:, None]), group_sizes)
    returned = block_exchange(dispatch_rows(results, row_of_slot, slot_of_row[:, None]))
    return combine_rows(returned, weights, plan.source, plan.row_of)


def compute_capacity(
    x: Float[Array, "batch seq d_model"],
    experts: Int[Array, "batch seq k"],
    weights: Float[Array, "batch seq k"],
    run: RunExperts,
    *,
    num_experts: int,
    ways: int,
    capacity: int,
    exchange: Exchange,
    weighted: bool = False,
) -> tuple[Float[Array, "batch seq d_model"], Float[Array, ""]]:
    """Computes at most `capacity` assignments of each sequence to each expert; buffers are of one size.

    Arguments as of `compute_dropless`; blocks of one size need no padding, so `ragged` and `padded` are the same here.

    Returns:
        The weighted sums, and how many assignments were dropped.
    """
    local, shape = num_experts // ways, x.shape
    gathers = exchange == "gather" and ways > 1
    if gathers:
        x, experts, weights = (_gather(a) for a in (x, experts, weights))
        experts, num_experts = own_experts(experts, local), local
    plan = capacity_plan(experts, num_experts, capacity)

    def across(rows: Array, group_sizes: Array) -> Array:
        """Rows are [device, its expert, row]: what arrives is [source, expert, row] and goes in by expert."""
        arrived = _swap(block_exchange(rows), ways, local)
        return block_exchange(_swap(run(arrived, ways * group_sizes[:local]), local, ways))

    flat, flat_weights = x.reshape(-1, shape[-1]), weights.reshape(-1, weights.shape[-1])
    y = _through(plan, flat, flat_weights, run if gathers or ways == 1 else across, weighted)
    dropped = jnp.sum(
        (experts < num_experts).reshape(plan.row_of.shape) & (plan.row_of >= plan.source.size), dtype=FULL
    )
    return (_scatter(y) if gathers else y).reshape(shape), dropped


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


def own_experts(experts: Int[Array, "*tokens k"], local: int) -> Int[Array, "*tokens k"]:
    """Numbers this device's experts from 0; `local` marks all others."""
    mine = experts - jax.lax.axis_index(AXIS) * local
    return jnp.where((mine >= 0) & (mine < local), mine, local)


def _through(plan: RowPlan, x: Array, weights: Array, run: RunExperts, weighted: bool = False) -> Array:
    plan = keep(plan)
    rows = dispatch_rows(x, plan.source, plan.row_of)
    if not weighted:
        return combine_rows(run(rows, plan.group_sizes), weights, plan.source, plan.row_of)
    (of_rows,) = dispatch_rows(weights.reshape(-1, 1), plan.source, plan.row_of.reshape(-1, 1)).T
    return collect_rows(run(rows, plan.group_sizes, of_rows), plan.source, plan.row_of)


def _in_blocks(plan: RowPlan, ways: int, block: int) -> RowPlan:
    """Moves the rows of every device to the beginning of a block of their own."""
    tokens, k = plan.row_of.shape
    sizes = jnp.sum(plan.group_sizes.reshape(ways, -1), axis=1)
    ends = jnp.cumsum(sizes)
    device = jnp.searchsorted(ends, plan.row_of, side="right")  # `ways` for what is sent to nobody
    begins = jnp.append(ends - sizes, 0)
    row_of = jnp.where(device < ways, device * block + plan.row_of - begins[device], ways * block).astype(jnp.int32)
    row = jnp.arange(ways * block, dtype=jnp.int32)
    filled = row % block < sizes[row // block]
    sorted_row = jnp.where(filled, begins[row // block] + row % block, 0)
    source = jnp.where(filled, plan.source[sorted_row], tokens * k).astype(jnp.int32)
    return RowPlan(source, row_of, plan.group_sizes)


def _swap(rows: Array, first: int, second: int) -> Array:
    return rows.reshape(first, second, -1, rows.shape[-1]).swapaxes(0, 1).reshape(rows.shape)


def _gather(x: Array) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=0, tiled=True)


def _scatter(x: Array) -> Array:
    return jax.lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)
