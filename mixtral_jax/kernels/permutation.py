"""Moves token rows to expert rows and back by gathers only: the backward pass is the inverse gather, no scatter-add.

An engine may do the same another way.
Both directions need the map from rows to assignments and its inverse. Assignment `t * k + j` is choice j of token t.
"""

import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.backends import load

T = TypeVar("T")


class RowMover(NamedTuple):
    """Who moves rows, one of `backends`, and whether it runs step by step."""

    backend: str = "xla"
    interpret: bool = False


GATHERS = RowMover()


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch_rows(
    x: Float[Array, "tokens d_model"],
    source: Int[Array, " rows"],
    row_of: Int[Array, "tokens k"],
    mover: RowMover = GATHERS,
) -> Float[Array, "rows d_model"]:
    """Gathers the token of every expert row.

    Args:
        x: token activations.
        source: assignment of each row; `tokens * k` or more marks an empty row, which becomes zero.
        row_of: row of each assignment; `rows` or more marks a dropped one.
        mover: who does it.
    """
    if mover.backend != "xla":
        spread: Array = load("rows", mover.backend).spread_rows(x, source, row_of, mover.interpret)
        return spread
    k = row_of.shape[1]
    return jnp.take(x, source // k, axis=0, mode="fill", fill_value=0)


def _dispatch_fwd(x: Array, source: Array, row_of: Array, mover: RowMover) -> tuple[Array, Array]:
    return dispatch_rows(x, source, row_of, mover), row_of


def _dispatch_bwd(_: RowMover, row_of: Array, d_rows: Array) -> tuple[Array, None, None]:
    return _sum_choices(d_rows, row_of), None, None


dispatch_rows.defvjp(_dispatch_fwd, _dispatch_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def combine_rows(
    rows: Float[Array, "rows d_model"],
    weights: Float[Array, "tokens k"],
    source: Int[Array, " rows"],
    row_of: Int[Array, "tokens k"],
    mover: RowMover = GATHERS,
) -> Float[Array, "tokens d_model"]:
    """Sums the weighted expert rows of every token, in the order of its choices; see `dispatch_rows` for the maps."""
    return _sum_choices(rows, row_of, weights.astype(rows.dtype))


def _combine_fwd(
    rows: Array, weights: Array, source: Array, row_of: Array, mover: RowMover
) -> tuple[Array, tuple[Array, ...]]:
    return combine_rows(rows, weights, source, row_of, mover), (rows, weights, source, row_of)


def _combine_bwd(mover: RowMover, residuals: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, None, None]:
    rows, weights, source, row_of = residuals
    if mover.backend != "xla":
        engine = load("rows", mover.backend)
        return *engine.combine_gradients(rows, weights, source, row_of, d_y, mover.interpret), None, None
    k = row_of.shape[1]
    row_weight = jnp.take(weights.reshape(-1), source, mode="fill", fill_value=0).astype(rows.dtype)
    d_rows = jnp.take(d_y, source // k, axis=0, mode="fill", fill_value=0) * row_weight[:, None]
    d_weights = jnp.stack(
        [jnp.sum(_choice(rows, row_of, j) * d_y, axis=-1, dtype=weights.dtype) for j in range(k)], axis=-1
    )
    return d_rows, d_weights, None, None


combine_rows.defvjp(_combine_fwd, _combine_bwd)


def in_padded_groups(
    run: Callable[[Array, Array], tuple[Array, T]],
    rows: Float[Array, "rows d_model"],
    sizes: Int[Array, " groups"],
    height: int,
) -> tuple[Float[Array, "rows d_model"], T]:
    """Calls a function of rows and sizes with groups padded to multiples of `height`, and takes the padding out.

    Args:
        run: gives a result of each row, and something else, which is handed on.
        rows: sorted by group.
        sizes: rows of each group.
        height: that of a tile.
    """
    padding = pad_groups(sizes, rows.shape[0], height)
    out, other = run(dispatch_rows(rows, padding.source, padding.place[:, None]), padding.sizes)
    return dispatch_rows(out, padding.place, padding.source[:, None]), other


def _choice(rows: Array, row_of: Array, j: int) -> Array:
    return jnp.take(rows, row_of[:, j], axis=0, mode="fill", fill_value=0)


def _sum_choices(rows: Array, row_of: Array, weights: Array | None = None) -> Array:
    choices = (_choice(rows, row_of, j) for j in range(row_of.shape[1]))
    if weights is not None:
        choices = (choice * weights[:, j : j + 1] for j, choice in enumerate(choices))
    return functools.reduce(operator.add, choices)


class Padding(NamedTuple):
    """Where the rows of every group are once each group begins at a multiple of a tile's height."""

    source: Int[Array, " padded"]  # row that a padded one is; the number of rows: none
    place: Int[Array, " rows"]  # padded row that a row is; the number of padded rows: none
    sizes: Int[Array, " groups"]  # padded rows of each group


def pad_groups(sizes: Int[Array, " groups"], num_rows: int, height: int) -> Padding:
    """Finds where rows sorted by group go when each group is padded with empty rows to a multiple of `height`."""
    counts = -(-sizes // height) * height
    ends, padded_ends = jnp.cumsum(sizes), jnp.cumsum(counts)
    num_padded = (num_rows + sizes.size * (height - 1)) // height * height  # as many as there can be

    def group_of(index: Array, ends: Array) -> Array:
        return jnp.searchsorted(ends, index, side="right", method="compare_all")

    def moved(index: Array, ends: Array, starts: Array, new_starts: Array, limits: Array, none: int) -> Array:
        group = jnp.minimum(group_of(index, ends), sizes.size - 1)
        within = index - starts[group]
        return jnp.where(within < limits[group], new_starts[group] + within, none).astype(jnp.int32)

    starts, padded_starts = ends - sizes, padded_ends - counts
    source = moved(jnp.arange(num_padded), padded_ends, padded_starts, starts, sizes, num_rows)
    place = moved(jnp.arange(num_rows), ends, starts, padded_starts, sizes, num_padded)
    return Padding(source, place, counts)
