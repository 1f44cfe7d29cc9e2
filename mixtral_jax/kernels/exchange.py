"""Moves rows between the devices of an expert group: the collectives, and the arithmetic of who sends what where.

Every device holds its rows sorted by expert, and so by the device that owns the expert. `ragged` sends exactly those
rows and they land sorted by expert; `padded` sends blocks of one size, wherever XLA runs, and the receiver sorts. The
backward pass of either is the same exchange the other way.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AXIS = "expert"  # the mesh axis whose devices exchange


class Slices(NamedTuple):
    """What one device sends and receives; entry `p * local_experts + e` belongs to device p. See ragged_all_to_all."""

    offsets: Int[Array, " slices"]  # first row of each slice that this device sends
    sizes: Int[Array, " slices"]  # its rows
    landing: Int[Array, " slices"]  # where it begins on the device that receives it
    arriving: Int[Array, " slices"]  # rows of each slice that this device receives


def expert_slices(counts: Int[Array, "devices experts"], me: Int[Array, ""]) -> tuple[Slices, Slices]:
    """Computes both directions of the ragged exchange of one device.

    Rows leave sorted by expert and arrive sorted by expert, those of one expert by the device they come from.

    Args:
        counts: rows that each device of the group sends to each expert; the experts in the order of their devices.
        me: place of this device in the group.

    Returns:
        The way to the experts, and the way back.
    """
    devices, num_experts = counts.shape
    local = num_experts // devices
    first_sent = _exclusive(counts, axis=1)  # [source, expert]
    # On the owner of an expert: the rows of its earlier experts, then those of this expert from earlier devices.
    by_owner = jnp.sum(counts, axis=0).reshape(devices, local)
    landed = _exclusive(by_owner, axis=1).reshape(1, num_experts) + _exclusive(counts, axis=0)  # [source, expert]
    mine = partial(jax.lax.dynamic_slice_in_dim, start_index=me * local, slice_size=local, axis=1)
    received = mine(counts).reshape(-1)  # [source * local]
    there = Slices(first_sent[me], counts[me], landed[me], received)
    back = Slices(mine(landed).reshape(-1), received, mine(first_sent).reshape(-1), counts[me])
    return there, back


def ragged_exchange(
    rows: Float[Array, "rows d_model"], there: Slices, back: Slices, num_rows: int
) -> Float[Array, "num_rows d_model"]:
    """Sends every slice of rows to its device.

    Args:
        rows: what this device sends from.
        there: the slices of this direction.
        back: those of the other one, for the backward pass.
        num_rows: size of the buffer that receives; rows where nothing lands are zero.
    """
    return _ragged(rows, there, back, rows.shape[0], num_rows)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged(rows: Array, there: Slices, back: Slices, num_sent: int, num_rows: int) -> Array:
    buffer = jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows, buffer, there.offsets, there.sizes, there.landing, there.arriving, axis_name=AXIS
    )


def _ragged_fwd(
    rows: Array, there: Slices, back: Slices, num_sent: int, num_rows: int
) -> tuple[Array, tuple[Slices, Slices]]:
    return _ragged(rows, there, back, num_sent, num_rows), (there, back)


def _ragged_bwd(
    num_sent: int, num_rows: int, residuals: tuple[Slices, Slices], d_out: Array
) -> tuple[Array, None, None]:
    there, back = residuals
    return _ragged(d_out, back, there, num_rows, num_sent), None, None


_ragged.defvjp(_ragged_fwd, _ragged_bwd)


def block_exchange(rows: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
    """Sends block p of equally many rows to device p; block p of the result came from it. It is its own inverse."""
    return jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)


def sort_arrivals(arriving: Int[Array, "devices local"], block: int) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """Maps between the rows of a padded exchange and the same rows sorted by expert.

    Args:
        arriving: rows from each device for each expert of this one; a device's block holds them in that order.
        block: rows of a device's block, those at its end empty.

    Returns:
        The arrived row of each sorted row, and the sorted row of each arrived one; devices * block where there is none.
    """
    devices, local = arriving.shape
    num_rows = devices * block
    begins = _exclusive(arriving, axis=1) + jnp.arange(devices, dtype=jnp.int32)[:, None] * block
    # Segment number s = expert * devices + source: the order of the sorted rows.
    sizes, begins = arriving.T.reshape(-1), begins.T.reshape(-1)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    segment = jnp.minimum(jnp.searchsorted(ends, row, side="right"), devices * local - 1)
    slot_of_row = jnp.where(row < ends[-1], begins[segment] + row - (ends - sizes)[segment], num_rows)
    source, place = row // block, row % block
    within = jnp.cumsum(arriving, axis=1)[source]  # [rows, local]
    expert = jnp.minimum(jnp.sum(place[:, None] >= within, axis=1), local - 1)
    segment = expert * devices + source
    row_of_slot = jnp.where(place < within[:, -1], (ends - sizes)[segment] + row - begins[segment], num_rows)
    return slot_of_row.astype(jnp.int32), row_of_slot.astype(jnp.int32)


def _exclusive(x: Array, axis: int) -> Array:
    """Sums of what comes before, along an axis."""
    return jnp.cumsum(x, axis=axis) - x
