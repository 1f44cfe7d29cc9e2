"""SwiGLU experts on Hopper GPUs: grouped products over rows that are sorted by expert and padded to whole tiles.

The weights are read in the stack of all layers where there is one, so that no layer's are copied out of it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from mixtral_jax.kernels.expert_ffn import ExpertWeights, GradientStack
from mixtral_jax.kernels.gpu.hopper_grouped import Scaling, gated, gmm, tgmm
from mixtral_jax.kernels.gpu.hopper_ring import Tiling
from mixtral_jax.kernels.permutation import in_padded_groups
from mixtral_jax.precision import FULL

HEIGHT = Tiling().height
# The fastest of those tried on an H200 at the widths of 8x7B; see docs/performance-log.md.
BY_COLUMN, FEW_NEIGHBOURS = Tiling(split=1), Tiling(split=1, neighbours=8)
EIGHT_BITS = Tiling(split=1, depth=128)  # as many bytes deep


def hopper_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: ExpertWeights,
    interpret: Any = None,
    *,
    row_multiple: int = 1,
) -> tuple[Float[Array, "rows d_model"], GradientStack | None]:
    """Computes `expert_ffn`, adding up in float32, padding rows to zero, and hands on the gradient stack.

    Args:
        rows: sorted by expert.
        group_sizes: rows of each expert.
        weights: the experts; `backends` says which widths.
        interpret: how to run the kernels step by step, on a CPU.
        row_multiple: what divides all group sizes; rows of others are moved to tiles first.
    """
    if row_multiple % HEIGHT == 0:
        return padded_ffn(rows, group_sizes, weights, interpret)
    return in_padded_groups(lambda x, sizes: padded_ffn(x, sizes, weights, interpret), rows, group_sizes, HEIGHT)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def padded_ffn(
    rows: Float[Array, "rows d_model"], sizes: Int[Array, " experts"], weights: ExpertWeights, interpret: Any
) -> tuple[Float[Array, "rows d_model"], GradientStack | None]:
    """Computes `hopper_ffn` from rows whose groups are padded."""
    return _fwd(rows, sizes, weights, interpret)[0]


def _fwd(rows: Array, sizes: Array, weights: ExpertWeights, interpret: Any) -> tuple[Any, tuple[Any, ...]]:
    *stacked, layer = weights.in_stack()
    matrices = [w.reshape(-1, *w.shape[2:]) for w in stacked]
    place = {"first_matrix": jnp.asarray(layer) * sizes.size, "interpret": interpret}
    w_gate, w_up, w_down = matrices
    gate, up, inner = gated(rows, w_gate, w_up, sizes, **place)
    out = gmm([(inner, w_down)], sizes, tiling=FEW_NEIGHBOURS, **place)
    return (out, weights.gradient_stack), (rows, sizes, matrices, layer, gate, up)


def _bwd(
    interpret: Any, residuals: tuple[Any, ...], cotangents: tuple[Array, GradientStack | None]
) -> tuple[Array, None, ExpertWeights]:
    rows, sizes, (w_gate, w_up, w_down), layer, gate, up = residuals
    d_out, d_stack = cotangents
    first = jnp.asarray(layer) * sizes.size
    place = {"first_matrix": first, "interpret": interpret, "transposed": True}
    d_inner = gmm([(d_out, w_down)], sizes, fill=False, tiling=BY_COLUMN, **place)
    inner, d_gate, d_up = _swiglu_gradients(gate, up, d_inner)
    d_rows = gmm([(d_gate, w_gate), (d_up, w_up)], sizes, tiling=BY_COLUMN, **place)
    sums = partial(tgmm, sizes=sizes, scaling=Scaling(w_gate.dtype), tiling=FEW_NEIGHBOURS, interpret=interpret)
    pairs = (rows, d_gate), (rows, d_up), (inner, d_out)
    if d_stack is None:
        d_gate, d_up, d_down = (sums(*pair) for pair in pairs)
        return d_rows, None, ExpertWeights(d_gate, d_up, d_down)
    stacks = [
        sums(*pair, into=(stack.reshape(-1, *stack.shape[2:]), first)).reshape(stack.shape)
        for pair, stack in zip(pairs, d_stack, strict=True)
    ]
    nothing: Any = None
    return d_rows, None, ExpertWeights(nothing, nothing, nothing, gradient_stack=(stacks[0], stacks[1], stacks[2]))


padded_ffn.defvjp(_fwd, _bwd)


def _swiglu_gradients(gate: Array, up: Array, d_inner: Array) -> tuple[Array, ...]:
    """Computes silu(gate) * up, and the gradients of gate and up from its own; padding rows hold anything."""
    g, u, d = (x.astype(FULL) for x in (gate, up, d_inner))
    share = jax.nn.sigmoid(g)
    results = g * share * u, d * u * share * (1 + g * (1 - share)), d * g * share
    return tuple(x.astype(gate.dtype) for x in results)


def multiply_8_bits(
    rows: Num[Array, "rows inner"],
    weights: Num[Array, "experts inner outer"],
    sizes: Int[Array, " experts"],
    scales: tuple[Float[Array, "rows 1"], Float[Array, "experts 1 outer"] | None],
    dtype: DTypeLike,
    interpret: Any = None,
) -> Float[Array, "rows outer"]:
    """Multiplies every row of 8-bit numbers with its expert's matrix, and with the scales; zeros in padding rows.

    Args:
        rows: sorted by expert.
        weights: of the experts; the matrix units want the side that is summed to lie together, so they are transposed.
        sizes: rows of each expert, multiples of a tile's height.
        scales: of rows, and of each expert's columns.
        dtype: of the result.
        interpret: how to run the kernel step by step, on a CPU.
    """
    of_rows, of_columns = scales
    scaling = Scaling(dtype, of_rows[:, 0], None if of_columns is None else of_columns[:, 0])
    pairs = [(rows, weights.swapaxes(1, 2))]
    return gmm(pairs, sizes, transposed=True, scaling=scaling, tiling=EIGHT_BITS, interpret=interpret)


def outer_products_8_bits(
    left: Num[Array, "rows inner"],
    right: Num[Array, "rows outer"],
    sizes: Int[Array, " experts"],
    column_scales: Float[Array, "1 outer"],
    into: tuple[Float[Array, "matrices inner outer"], Int[Array, ""]] | None,
    dtype: DTypeLike,
    interpret: Any = None,
) -> Float[Array, "matrices inner outer"]:
    """Sums the products of 8-bit numbers over every expert's rows, multiplied with the scales; see `tgmm`."""
    scaling = Scaling(dtype, columns=column_scales)
    how = {"into": into, "tiling": EIGHT_BITS, "interpret": interpret}
    return tgmm(left.T, right.T, sizes, scaling, transposed=True, **how)
