"""Causal attention on the matrix units of x86 processors, in float32, for XLA's programs: see `amx_attend` for how.

Queries, keys, values and their gradients lie as the model has them; nothing is transposed or padded in memory.
"""

import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.attention import AttentionInputs
from mixtral_jax.kernels.cpu.amx_attend import SQUARE, attend_blocks, differentiate_attention
from mixtral_jax.kernels.cpu.intrinsics import (
    ATTEND,
    DIFFERENTIATE,
    compiled,
    read_short,
    read_state,
    set_state,
    view,
    write,
)
from mixtral_jax.kernels.cpu.thread_pool import ARGUMENTS, argument, begin, end, new_job, run_by_all_threads
from mixtral_jax.kernels.cpu.xla_ffi import answer_version_query, count_results, data, dim, operand, register, result
from mixtral_jax.precision import FULL
from mixtral_jax.remat import save_for_backward

BLOCK = 32  # positions, and elements of the head dimension
ALIGNMENT = 64  # bytes, of addresses of blocks in XLA's memory
# Bytes from a job's address. Its arguments are the addresses of operands and results, from SHAPE on sizes.
SHAPE, FACTORS = 11, ARGUMENTS + 128
COUNTERS = FACTORS + 3 * BLOCK * 4
SPANS = COUNTERS + 64


def attend(inputs: AttentionInputs, mesh: Mesh) -> Float[Array, "batch seq heads head_dim"]:
    """Computes `kernels.attention` on one device."""
    return amx_attention(inputs.q, inputs.k, inputs.v, inputs.q_segment_ids)


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
    batch, seq, heads, _ = q.shape
    blocks = -(-seq // BLOCK)
    results = [
        jax.ShapeDtypeStruct(q.shape, FULL),
        jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK), FULL),
        jax.ShapeDtypeStruct((2 * _elements_of_blocks(k),), FULL),
    ]
    out, log_totals, _ = jax.ffi.ffi_call("amx_attention", results)(q, k, v, segment_ids.astype(jnp.int32))
    out, log_totals = save_for_backward((out, log_totals))
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
    return batch * heads * -(-seq // BLOCK) * -(-head_dim // BLOCK) * BLOCK**2 + ALIGNMENT // 4


@compiled
@no_type_check
def _blocks(job: int) -> int:
    return (argument(job, SHAPE + 1) + BLOCK - 1) // BLOCK


@compiled
@no_type_check
def _parts(job: int) -> int:
    return argument(job, SHAPE) * argument(job, SHAPE + 3) * _blocks(job)


@compiled
@no_type_check
def _spans(job: int) -> np.ndarray:
    return view(job + SPANS, argument(job, SHAPE), _blocks(job) * BLOCK, np.int32)


@compiled
@no_type_check
def _shape(job: int) -> tuple[int, int, int, int, int]:
    return (
        argument(job, SHAPE), argument(job, SHAPE + 1), argument(job, SHAPE + 2), argument(job, SHAPE + 3),
        argument(job, SHAPE + 4),
    )  # fmt: skip


@compiled
@no_type_check
def _progress(job: int) -> np.ndarray:
    """How far the gradients of blocks of queries are."""
    batch, _, _, kv_heads, _ = _shape(job)
    place = job + SPANS + 4 * batch * _blocks(job) * BLOCK
    return view(place, batch * kv_heads, (_blocks(job) + SQUARE - 1) // SQUARE, np.int64)


@compiled
@no_type_check
def _begin(frame: int, operands: int) -> int:
    """Makes a job with all that tasks read: a thread may come when the call has ended."""
    q, k = operand(frame, 0), operand(frame, 1)
    batch, seq, kv_heads = dim(q, 0), dim(q, 1), dim(k, 2)
    length = (seq + BLOCK - 1) // BLOCK * BLOCK
    job = new_job(frame, SPANS - ARGUMENTS + 4 * batch * length + 8 * batch * kv_heads * length)
    for i in range(operands):
        write(job + ARGUMENTS + 8 * i, data(operand(frame, i)))
    for i in range(count_results(frame)):
        write(job + ARGUMENTS + 8 * (operands + i), data(result(frame, i)))
    for i in range(4):
        write(job + ARGUMENTS + 8 * (SHAPE + i), dim(k, 2) if i == 3 else dim(q, i))
    write(job + ARGUMENTS + 8 * (SHAPE + 4), dim(q, 3))
    factors, scale = view(job + FACTORS, 3, BLOCK, np.float32), dim(q, 3) ** -0.5
    factors[0], factors[1], factors[2] = scale / math.log(2), scale, 1
    ids, spans = argument(job, 3), _spans(job)
    for row in range(batch):
        begun = 0
        for i in range(length):  # beyond the last they see themselves
            place = ids + 4 * (row * seq + i)
            if i >= seq or i == 0 or read_short(place) != read_short(place - 4):
                begun = i
            spans[row, i] = i - begun + 1
    return job


@compiled
@no_type_check
def _aligned(address: int) -> int:
    return (address + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@no_type_check
def _handle(frame: int) -> int:
    """Operands q, k, v, segment_ids; results out, log_totals, memory for keys and values as factors."""
    if answer_version_query(frame):
        return 0
    job = _begin(frame, 4)
    run_by_all_threads(job, read_state(ATTEND), _parts(job))
    return 0


@no_type_check
def _attend_task(job: int) -> int:
    """Takes part in `_handle`."""
    workspace = begin(job)
    attend_blocks(
        argument(job, 0), argument(job, 1), argument(job, 2), _spans(job), argument(job, 4), argument(job, 5),
        _aligned(argument(job, 6)), _shape(job), job + FACTORS, job + COUNTERS, workspace,
    )  # fmt: skip
    end(job, workspace)
    return 0


@no_type_check
def _handle_gradients(frame: int) -> int:
    """Operands q, k, v, segment_ids, out, log_totals, d_out; results d_q, d_k, d_v, memory for d_q in blocks."""
    if answer_version_query(frame):
        return 0
    job = _begin(frame, 7)
    run_by_all_threads(job, read_state(DIFFERENTIATE), _parts(job))
    return 0


@no_type_check
def _differentiate_task(job: int) -> int:
    """Takes part in `_handle_gradients`."""
    workspace = begin(job)
    differentiate_attention(
        argument(job, 0), argument(job, 1), argument(job, 2), _spans(job), argument(job, 4), argument(job, 5),
        argument(job, 6), argument(job, 7), argument(job, 8), argument(job, 9), _aligned(argument(job, 10)),
        _shape(job), job + FACTORS, _progress(job), job + COUNTERS, workspace,
    )  # fmt: skip
    end(job, workspace)
    return 0


set_state(ATTEND, _attend_task)
set_state(DIFFERENTIATE, _differentiate_task)
register("amx_attention", _handle)
register("amx_attention_gradients", _handle_gradients)
