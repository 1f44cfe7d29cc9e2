"""The SwiGLU experts for a few rows on any platform: weights of experts without rows are not read.

A loop over blocks of rows cuts the weights of a block's expert out of the stack of all layers; it turns as often as
there are blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.stored import Matrices, StoredExperts
from mixtral_jax.precision import FULL

BLOCK = 8  # rows
ROWS = 2  # of an expert, on average, with which one in seven experts has none; with more, other backends take over


def few(assignments: int, experts: int) -> bool:
    """Says whether so many assignments are likely to leave out some of the experts."""
    return assignments <= ROWS * experts


def stored_ffn(
    rows: Float[Array, "rows d_model"], group_sizes: Int[Array, " experts"], experts: StoredExperts
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert; see `expert_ffn`."""
    padded = jnp.pad(rows, ((0, BLOCK), (0, 0)))
    starts, blocks = jnp.cumsum(group_sizes) - group_sizes, -(-group_sizes // BLOCK)
    ends = jnp.cumsum(blocks)

    def block(number: Array, out: Array) -> Array:
        expert = jnp.searchsorted(ends, number, side="right", method="compare_all")
        row = starts[expert] + (number - ends[expert] + blocks[expert]) * BLOCK
        x = jax.lax.dynamic_slice_in_dim(padded, row, BLOCK)
        gate, up, down = (_matrix(m, experts.layer, expert, rows) for m in experts[:3])
        y = (jax.nn.silu(x @ gate) * (x @ up)) @ down
        return jax.lax.dynamic_update_slice_in_dim(out, y, row, axis=0)  # the next expert overwrites what is too much

    return jax.lax.fori_loop(0, ends[-1], block, jnp.zeros_like(padded))[: len(rows)]


def _matrix(held: Matrices, layer: Array, expert: Array, like: Array) -> Array:
    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice(x, (layer, expert, 0, 0), (1, 1, *x.shape[2:]))[0, 0]

    if held.scale is None:
        return cut(held.values).astype(like.dtype)
    return (cut(held.values).astype(FULL) * cut(held.scale)).astype(like.dtype)
