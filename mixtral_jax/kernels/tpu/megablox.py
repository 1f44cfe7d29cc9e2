"""SwiGLU experts by megablox, JAX's grouped matrix product for TPU."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.ops import gmm
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
    x = jnp.pad(jnp.where(used, rows, 0), ((0, -rows.shape[0] % _tiling(rows, w_gate)[0]), (0, 0)))
    gate, up = _megablox(x, w_gate, sizes, interpret), _megablox(x, w_up, sizes, interpret)
    out = _megablox(jax.nn.silu(gate) * up, w_down, sizes, interpret)
    return jnp.where(used, out[: rows.shape[0]], 0)


def _tiling(rows: Array, weights: Array) -> tuple[int, int, int]:
    """Rows, inner and outer width of a block: `TILING`, or less where the arrays are smaller or the type is wider."""
    wide = rows.dtype.itemsize > 2
    limits = [size // 2 if wide else size for size in TILING]
    sizes = (rows.shape[0], *weights.shape[1:])
    tiles = [min(limit, -(-size // LANES) * LANES) for limit, size in zip(limits, sizes, strict=True)]
    return tiles[0], tiles[1], tiles[2]


def _megablox(rows: Array, weights: Array, sizes: Array, interpret: bool) -> Array:
    return gmm(rows, weights, sizes, rows.dtype, _tiling(rows, weights), None, None, False, interpret)
