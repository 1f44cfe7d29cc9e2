"""Causal attention on the matrix units of x86 processors, in float32, for XLA's programs: see `amx_attend` for how.

Queries, keys, values and their gradients lie as the model has them; nothing is transposed or padded in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.precision import FULL
from mixtral_jax.remat import keep

BLOCK = 32  # positions, and elements of the head dimension
LARGEST_HEAD = 256  # what is made of some blocks of it fits the L2 cache
ALIGNMENT = 16  # elements; of the blocks in memory of XLA's, see `amx_attention_calls`


@functools.cache
def _register() -> None:
    from mixtral_jax.kernels.cpu import amx_attention_calls, intrinsics, xla_ffi

    intrinsics.know(intrinsics.ATTEND, amx_attention_calls.attend_task)
    intrinsics.know(intrinsics.DIFFERENTIATE, amx_attention_calls.differentiate_task)
    xla_ffi.register("amx_attention", amx_attention_calls.forward)
    xla_ffi.register("amx_attention_gradients", amx_attention_calls.backward)


@jax.custom_vjp
def amx_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Computes `kernels.attention`."""
    return _fwd(q, k, v, segment_ids)[0]


def _fwd(q: Array, k: Array, v: Array, segment_ids: Array) -> tuple[Array, tuple[Array, ...]]:
    _register()
    batch, seq, heads, _ = q.shape
    blocks = -(-seq // BLOCK)
    results = [
        jax.ShapeDtypeStruct(q.shape, FULL),
        jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK), FULL),
        jax.ShapeDtypeStruct((2 * _elements_of_blocks(k),), FULL),
    ]
    out, log_totals, _ = jax.ffi.ffi_call("amx_attention", results)(q, k, v, segment_ids.astype(jnp.int32))
    out, log_totals = keep((out, log_totals))
    return out, (q, k, v, segment_ids, out, log_totals)


def _bwd(residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, segment_ids, out, log_totals = residuals
    results = [jax.ShapeDtypeStruct(x.shape, FULL) for x in (q, k, v)]
    sums = jax.ShapeDtypeStruct((_elements_of_blocks(q),), FULL)
    call = jax.ffi.ffi_call("amx_attention_gradients", [*results, sums])
    d_q, d_k, d_v, _ = call(q, k, v, segment_ids.astype(jnp.int32), out, log_totals, d_out)
    return d_q, d_k, d_v, None


amx_attention.defvjp(_fwd, _bwd)


def _elements_of_blocks(x: Array) -> int:
    batch, seq, heads, head_dim = x.shape
    return batch * heads * -(-seq // BLOCK) * -(-head_dim // BLOCK) * BLOCK**2 + ALIGNMENT
