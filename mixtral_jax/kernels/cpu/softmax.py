"""Softmax of logits and its derivative by all threads: a row lies in the cache while it is read thrice."""

import math
from typing import NamedTuple, no_type_check

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.cpu.intrinsics import SOFTMAX, compiled, read_short, read_state, set_state, view, write
from mixtral_jax.kernels.cpu.simd import find_peak, scale_row, sum_exponentials
from mixtral_jax.kernels.cpu.thread_pool import (
    ARGUMENTS,
    COUNTER,
    argument,
    begin,
    end,
    new_job,
    run_by_all_threads,
    take_next,
)
from mixtral_jax.kernels.cpu.xla_ffi import (
    answer_version_query,
    attribute,
    count_results,
    data,
    dim,
    operand,
    register,
    result,
)
from mixtral_jax.precision import FULL

ROWS = 8  # that a thread takes at a time


class Rows(NamedTuple):
    """What is known of rows of logits."""

    log_total: Float[Array, " rows"]  # logarithm of the sum of all exponentials
    at_target: Float[Array, " rows"]
    peak: Float[Array, " rows"]


def summarize(logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"]) -> Rows:
    """Computes what losses need of logits."""
    call = jax.ffi.ffi_call("cpu_softmax", [jax.ShapeDtypeStruct(targets.shape, FULL)] * 3)
    return Rows(*call(logits, targets.astype(np.int32), gradient=np.int64(0)))


def differentiate(
    logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"], mask: Bool[Array, " rows"]
) -> tuple[Rows, Float[Array, "rows vocab"]]:
    """Computes the same and the gradient of the sum of losses of rows within the mask, in the memory of the logits."""
    results = [jax.ShapeDtypeStruct(logits.shape, FULL), *[jax.ShapeDtypeStruct(targets.shape, FULL)] * 3]
    call = jax.ffi.ffi_call("cpu_softmax", results, input_output_aliases={0: 0})
    d_logits, *rows = call(logits, targets.astype(np.int32), mask.astype(np.int32), gradient=np.int64(1))
    return Rows(*rows), d_logits


@compiled
@no_type_check
def _float(address: int, i: int) -> np.ndarray:
    return view(address + 4 * i, 1, 1, np.float32)[0]


@no_type_check
def _handle(frame: int) -> int:
    """Operands logits, targets, a mask for the gradient; results the gradient, if any, log_total, at_target, peak."""
    if answer_version_query(frame):
        return 0
    logits, gradient = operand(frame, 0), attribute(frame, 0)
    job = new_job(frame, 8 * 9)
    write(job + ARGUMENTS, dim(logits, 0))
    write(job + ARGUMENTS + 8, dim(logits, 1))
    write(job + ARGUMENTS + 16, gradient)
    for i in range(2 + gradient):
        write(job + ARGUMENTS + 8 * (3 + i), data(operand(frame, i)))
    for i in range(3):
        write(job + ARGUMENTS + 8 * (6 + i), data(result(frame, count_results(frame) - 3 + i)))
    run_by_all_threads(job, read_state(SOFTMAX), dim(logits, 0) // ROWS + 1)
    return 0


@no_type_check
def _task(job: int) -> int:
    """Takes part in `_handle`."""
    workspace = begin(job)
    rows, columns, gradient = argument(job, 0), argument(job, 1), argument(job, 2)
    log_total, at_target, peaks = argument(job, 6), argument(job, 7), argument(job, 8)
    while True:
        first = take_next(job + COUNTER) * ROWS
        if first >= rows:
            break
        for row in range(first, min(rows, first + ROWS)):
            logits, target = argument(job, 3) + 4 * row * columns, read_short(argument(job, 4) + 4 * row)
            wanted = gradient != 0 and read_short(argument(job, 5) + 4 * row) != 0
            _float(at_target, row)[0] = _float(logits, target)[0]
            peak = find_peak(logits, columns)
            if wanted:
                total = sum_exponentials(logits, columns, peak, 1)
                scale_row(logits, columns, np.float32(1) / total)
                _float(logits, target)[0] -= np.float32(1)
            else:
                total = sum_exponentials(logits, columns, peak, 0)
                if gradient:
                    view(logits, 1, columns, np.float32)[:] = 0
            _float(log_total, row)[0] = peak + math.log(total)
            _float(peaks, row)[0] = peak
    end(job, workspace)
    return 0


set_state(SOFTMAX, _task)
register("cpu_softmax", _handle)
