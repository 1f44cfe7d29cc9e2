"""Grouped products, and SwiGLU experts by them, by megablox, JAX's kernel for TPU."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.experimental.pallas.ops.tpu.megablox.ops import gmm
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# Rows, inner and outer width of a block of megablox, in 2-byte types: with double buffering some 10 MiB, which the
# vector memory of every TPU holds.
TILING = (512, 1024, 1024)
LANES = 128  # a TPU's registers are so wide


def megablox_ffn(
    rows: Float[Array, "rows d_model"],
    sizes: Int[Array, " experts"],
    w_gate: Float[Array, "experts d_model d_ff"],
    w_up: Float[Array, "experts d_model d_ff"],
    w_down: Float[Array, "experts d_ff d_model"],
    interpret: bool,
) -> Float[Array, "rows d_model"]:
    """Computes `expert_ffn`; padding rows become zero."""
    # Megablox leaves the memory of padding rows as it finds it, in outputs and in gradients.
    used = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    x = _padded(jnp.where(used, rows, 0), _tiling(rows, w_gate.shape[1], w_gate.shape[2], rows.dtype))
    gate, up = (multiply(x, w, sizes, rows.dtype, interpret) for w in (w_gate, w_up))
    out = multiply(jax.nn.silu(gate) * up, w_down, sizes, rows.dtype, interpret)
    return jnp.where(used, out[: rows.shape[0]], 0)


def multiply(
    rows: Float[Array, "rows k"],
    weights: Float[Array, "experts k n"],
    sizes: Int[Array, " experts"],
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "rows n"]:
    """Multiplies rows, sorted by expert, with their expert's matrix; padding rows become anything."""
    tiling = _tiling(rows, weights.shape[1], weights.shape[2], dtype)
    out: Array = gmm(_padded(rows, tiling), weights, sizes, dtype, tiling, None, None, False, interpret)
    return out[: rows.shape[0]]


def outer_products(
    x: Float[Array, "rows k"],
    y: Float[Array, "rows n"],
    sizes: Int[Array, " experts"],
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "experts k n"]:
    """Sums over each expert's rows the products of an element of x with one of y."""
    tiling = _tiling(x, x.shape[1], y.shape[1], dtype)
    out: Array = tgmm(_padded(x, tiling).T, _padded(y, tiling), sizes, dtype, tiling, interpret=interpret)
    return out


def _tiling(rows: Array, inner: int, outer: int, sums: DTypeLike) -> tuple[int, int, int]:
    """`TILING`, or less where the arrays are smaller, or factors or sums wider than two bytes."""
    factor, wide = rows.dtype.itemsize, max(rows.dtype.itemsize, jnp.dtype(sums).itemsize)
    limits = [size * 2 // max(2, width) for size, width in zip(TILING, (factor, factor, wide), strict=True)]
    sizes = (rows.shape[0], inner, outer)
    tiles = [min(limit, -(-size // LANES) * LANES) for limit, size in zip(limits, sizes, strict=True)]
    return tiles[0], tiles[1], tiles[2]


def _padded(rows: Array, tiling: tuple[int, int, int]) -> Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % tiling[0]), (0, 0)))
