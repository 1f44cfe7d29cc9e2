"""SwiGLU experts on Hopper GPUs: grouped products over rows that are sorted by expert and padded to whole tiles.

The weights are read in the stack of all layers where there is one, so that no layer's are copied out of it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.expert_ffn import ExpertWeights
from mixtral_jax.kernels.gpu.hopper_grouped import gated, gmm, tgmm
from mixtral_jax.kernels.gpu.hopper_ring import Tiling
from mixtral_jax.kernels.permutation import collect_rows, dispatch_rows
from mixtral_jax.precision import FULL

HEIGHT = Tiling().height
# The fastest of those tried on an H200 at the widths of 8x7B; see docs/performance.md.
BY_COLUMN = Tiling(split=1)
TWO_PRODUCTS = Tiling(partners=2)


class Padding(NamedTuple):
    """Where the rows of every group are once each group begins at a multiple of a tile's height."""

    source: Int[Array, " padded"]  # row that a padded one is; the number of rows: none
    place: Int[Array, "rows 1"]  # padded row that a row is; the number of padded rows: none
    sizes: Int[Array, " groups"]  # padded rows of each group


def hopper_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: ExpertWeights,
    interpret: Any = None,
) -> Float[Array, "rows d_model"]:
    """Computes `expert_ffn`, adding up in float32; padding rows become zero.

    Args:
        rows: sorted by expert.
        group_sizes: rows of each expert.
        weights: the experts; `backends` says which widths.
        interpret: how to run the kernels step by step, on a CPU.
    """
    padding = pad_groups(group_sizes, rows.shape[0], HEIGHT)
    x = dispatch_rows(rows, padding.source, padding.place)
    return collect_rows(padded_ffn(x, padding.sizes, weights, interpret), padding.source, padding.place)


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
    return Padding(source, place[:, None], counts)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def padded_ffn(
    rows: Float[Array, "rows d_model"], sizes: Int[Array, " experts"], weights: ExpertWeights, interpret: Any
) -> Float[Array, "rows d_model"]:
    """Computes the experts' outputs from rows whose groups are padded; see `hopper_ffn`."""
    return _fwd(rows, sizes, weights, interpret)[0]


def _fwd(rows: Array, sizes: Array, weights: ExpertWeights, interpret: Any) -> tuple[Array, tuple[Any, ...]]:
    *stacked, layer = weights.in_stack()
    matrices = [w.reshape(-1, *w.shape[2:]) for w in stacked]
    place = {"first_matrix": jnp.asarray(layer) * sizes.size, "interpret": interpret}
    w_gate, w_up, w_down = matrices
    gate, up, inner = gated(rows, w_gate, w_up, sizes, **place)
    out = gmm([(inner, w_down)], sizes, **place)
    return out, (rows, sizes, matrices, layer, gate, up)


def _bwd(interpret: Any, residuals: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    rows, sizes, (w_gate, w_up, w_down), layer, gate, up = residuals
    place = {"first_matrix": jnp.asarray(layer) * sizes.size, "interpret": interpret, "transposed": True}
    d_inner = gmm([(d_out, w_down)], sizes, fill=False, tiling=BY_COLUMN, **place)
    inner, d_gate, d_up = _swiglu_gradients(gate, up, d_inner)
    tiling = TWO_PRODUCTS if rows.shape[1] % (TWO_PRODUCTS.width * TWO_PRODUCTS.partners) == 0 else BY_COLUMN
    d_rows = gmm([(d_gate, w_gate), (d_up, w_up)], sizes, tiling=tiling, **place)
    pairs = ((rows, d_gate), (rows, d_up), (inner, d_out))
    d_gate, d_up, d_down = (tgmm(left, right, sizes, w_gate.dtype, interpret=interpret) for left, right in pairs)
    return d_rows, None, ExpertWeights(d_gate, d_up, d_down)


padded_ffn.defvjp(_fwd, _bwd)


def _swiglu_gradients(gate: Array, up: Array, d_inner: Array) -> tuple[Array, ...]:
    """Computes silu(gate) * up, and the gradients of gate and up from its own; padding rows hold anything."""
    g, u, d = (x.astype(FULL) for x in (gate, up, d_inner))
    share = jax.nn.sigmoid(g)
    results = g * share * u, d * u * share * (1 + g * (1 - share)), d * g * share
    return tuple(x.astype(gate.dtype) for x in results)
