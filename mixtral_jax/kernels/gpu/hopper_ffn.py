"""SwiGLU experts on Hopper GPUs: grouped products over rows that are sorted by expert and padded to whole tiles."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.gpu.hopper_grouped import TILING, gated, gmm, tgmm
from mixtral_jax.kernels.permutation import collect_rows, dispatch_rows
from mixtral_jax.precision import FULL


class Padding(NamedTuple):
    """Where the rows of every group are once each group begins at a multiple of a tile's height."""

    source: Int[Array, " padded"]  # row that a padded one is; the number of rows: none
    place: Int[Array, "rows 1"]  # padded row that a row is; the number of padded rows: none
    sizes: Int[Array, " groups"]  # padded rows of each group


def hopper_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    w_gate: Float[Array, "experts d_model d_ff"],
    w_up: Float[Array, "experts d_model d_ff"],
    w_down: Float[Array, "experts d_ff d_model"],
    interpret: Any = None,
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert, adding up in float32; see `expert_ffn`.

    Args:
        rows: sorted by expert.
        group_sizes: rows of each expert.
        w_gate, w_up, w_down: the experts, their widths multiples of a tile's.
        interpret: how to run the kernels step by step, on a CPU.

    Returns:
        One output a row, zeros in rows of nobody.
    """
    padding = pad_groups(group_sizes, rows.shape[0], TILING.height)
    x = dispatch_rows(rows, padding.source, padding.place)
    out = padded_ffn(x, padding.sizes, w_gate, w_up, w_down, interpret)
    return collect_rows(out, padding.source, padding.place)


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


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def padded_ffn(rows: Array, sizes: Array, w_gate: Array, w_up: Array, w_down: Array, interpret: Any) -> Array:
    """Computes the experts' outputs from rows whose groups are padded; see `hopper_ffn`."""
    return _fwd(rows, sizes, w_gate, w_up, w_down, interpret)[0]


def _fwd(
    rows: Array, sizes: Array, w_gate: Array, w_up: Array, w_down: Array, interpret: Any
) -> tuple[Array, tuple[Array, ...]]:
    gate, up, inner = gated(rows, w_gate, w_up, sizes, interpret=interpret)
    out = gmm([(inner, w_down)], sizes, interpret=interpret)
    return out, (rows, sizes, w_gate, w_up, w_down, gate, up)


def _bwd(interpret: Any, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, sizes, w_gate, w_up, w_down, gate, up = residuals
    d_inner = gmm([(d_out, w_down)], sizes, transposed=True, fill=False, interpret=interpret)
    inner, d_gate, d_up = _swiglu_gradients(gate, up, d_inner)
    d_rows = gmm([(d_gate, w_gate), (d_up, w_up)], sizes, transposed=True, interpret=interpret)
    pairs = ((rows, d_gate), (rows, d_up), (inner, d_out))
    return d_rows, None, *(tgmm(left, right, sizes, w_gate.dtype, interpret=interpret) for left, right in pairs)


padded_ffn.defvjp(_fwd, _bwd)


def _swiglu_gradients(gate: Array, up: Array, d_inner: Array) -> tuple[Array, ...]:
    """Computes silu(gate) * up, and the gradients of gate and up from its own; rows of nobody hold anything."""
    g, u, d = (x.astype(FULL) for x in (gate, up, d_inner))
    share = jax.nn.sigmoid(g)
    results = g * share * u, d * u * share * (1 + g * (1 - share)), d * g * share
    return tuple(x.astype(gate.dtype) for x in results)
