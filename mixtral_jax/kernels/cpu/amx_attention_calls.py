"""The foreign functions behind `amx_attention`, and the tasks of their jobs."""

import math
from typing import no_type_check

import numpy as np

from mixtral_jax.kernels.cpu.amx_attend import SQUARE, attend, differentiate_attention
from mixtral_jax.kernels.cpu.intrinsics import ATTEND, DIFFERENTIATE, compiled, known, read_short, view, write
from mixtral_jax.kernels.cpu.thread_pool import ARGUMENTS, argument, begin, end, new_job, share
from mixtral_jax.kernels.cpu.xla_ffi import asked, count_results, data, dim, operand, result

BLOCK, ALIGNMENT = 32, 64  # positions; bytes of addresses of blocks
# Bytes from a job's address. Its arguments are the addresses of operands and results, from SHAPE on sizes.
SHAPE, FACTORS = 11, ARGUMENTS + 128
COUNTERS = FACTORS + 3 * BLOCK * 4
SPANS = COUNTERS + 64


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
def forward(frame: int) -> int:
    """Operands q, k, v, segment_ids; results out, log_totals, memory for keys and values as factors."""
    if asked(frame):
        return 0
    job = _begin(frame, 4)
    share(job, known(ATTEND), _parts(job))
    return 0


@no_type_check
def attend_task(job: int) -> int:
    """Takes part in `forward`."""
    workspace = begin(job)
    attend(
        argument(job, 0), argument(job, 1), argument(job, 2), _spans(job), argument(job, 4), argument(job, 5),
        _aligned(argument(job, 6)), _shape(job), job + FACTORS, job + COUNTERS, workspace,
    )  # fmt: skip
    end(job, workspace)
    return 0


@no_type_check
def backward(frame: int) -> int:
    """Operands q, k, v, segment_ids, out, log_totals, d_out; results d_q, d_k, d_v, memory for d_q in blocks."""
    if asked(frame):
        return 0
    job = _begin(frame, 7)
    share(job, known(DIFFERENTIATE), _parts(job))
    return 0


@no_type_check
def differentiate_task(job: int) -> int:
    """Takes part in `backward`."""
    workspace = begin(job)
    differentiate_attention(
        argument(job, 0), argument(job, 1), argument(job, 2), _spans(job), argument(job, 4), argument(job, 5),
        argument(job, 6), argument(job, 7), argument(job, 8), argument(job, 9), _aligned(argument(job, 10)),
        _shape(job), job + FACTORS, _progress(job), job + COUNTERS, workspace,
    )  # fmt: skip
    end(job, workspace)
    return 0
