"""Causal attention on the matrix units of x86 processors, in float32, for XLA's programs: see `amx_attend` for how.

Queries, keys, values and their gradients lie as the model has them; nothing is transposed or padded in memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.amx import units
from mixtral_jax.kernels.foreign import Buffer, register
from mixtral_jax.precision import FULL
from mixtral_jax.remat import keep

BLOCK = 32  # positions, and elements of the head dimension
LARGEST_HEAD = 256  # what is made of some blocks of it fits the L2 cache
ALIGNMENT = 16  # elements; of the blocks in memory of XLA's


@functools.cache
def _register() -> None:
    register("amx_attention", _forward)
    register("amx_attention_gradients", _backward)


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


def _forward(
    q: Buffer, k: Buffer, v: Buffer, segment_ids: Buffer, out: Buffer, log_totals: Buffer, packed: Buffer
) -> None:
    from mixtral_jax.kernels.amx_attend import attend

    shape, factors = _shape(q, k), _factors(q.shape[3])
    counters = np.zeros(3, np.int64)
    _run(
        attend, q.address, k.address, v.address, _spans(segment_ids), out.address, log_totals.address,
        _aligned(packed), shape, factors.ctypes.data, counters.ctypes.data,
    )  # fmt: skip


def _backward(
    q: Buffer,
    k: Buffer,
    v: Buffer,
    segment_ids: Buffer,
    out: Buffer,
    log_totals: Buffer,
    d_out: Buffer,
    d_q: Buffer,
    d_k: Buffer,
    d_v: Buffer,
    sums: Buffer,
) -> None:
    from mixtral_jax.kernels.amx_attend import differentiate_attention

    shape, factors = _shape(q, k), _factors(q.shape[3])
    counter, progress = np.zeros(1, np.int64), np.zeros((shape[0] * shape[3], -(-shape[1] // BLOCK)), np.int64)
    _run(
        differentiate_attention, q.address, k.address, v.address, _spans(segment_ids), out.address, log_totals.address,
        d_out.address, d_q.address, d_k.address, d_v.address, _aligned(sums), shape, factors.ctypes.data, progress,
        counter.ctypes.data,
    )  # fmt: skip


def _run(*arguments: Any) -> None:
    found = units()
    assert found is not None  # see `runtime.choose_attention`
    found.run(*arguments)


def _shape(q: Buffer, k: Buffer) -> tuple[int, int, int, int, int]:
    batch, seq, heads, head_dim = q.shape
    return batch, seq, heads, k.shape[2], head_dim


def _factors(head_dim: int) -> np.ndarray:
    return np.repeat([head_dim**-0.5 / math.log(2), head_dim**-0.5, 1], BLOCK).astype(np.float32)


def _aligned(buffer: Buffer) -> int:
    return buffer.address + -buffer.address % (4 * ALIGNMENT)


def _spans(segment_ids: Buffer) -> np.ndarray:
    """Counts the positions that each sees; those that fill the last block up see themselves."""
    (batch, seq), ids = segment_ids.shape, segment_ids.array(np.int32)
    begins = np.ones(ids.shape, bool)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    index = np.arange(seq, dtype=np.int32)
    spans = np.ones((batch, -(-seq // BLOCK) * BLOCK), np.int32)
    spans[:, :seq] += index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return spans
