"""The foreign function behind `softmax`: a row of logits lies in the cache while it is read thrice."""

import math
from typing import no_type_check

import numpy as np

from mixtral_jax.kernels.cpu.intrinsics import SOFTMAX, compiled, known, read_short, view, write
from mixtral_jax.kernels.cpu.simd import find_peak, scale_row, sum_exponentials
from mixtral_jax.kernels.cpu.thread_pool import ARGUMENTS, COUNTER, argument, begin, end, new_job, share, take_next
from mixtral_jax.kernels.cpu.xla_ffi import asked, attribute, count_results, data, dim, operand, result

ROWS = 8  # that a thread takes at a time


@compiled
@no_type_check
def _float(address: int, i: int) -> np.ndarray:
    return view(address + 4 * i, 1, 1, np.float32)[0]


@no_type_check
def softmax(frame: int) -> int:
    """Operands logits, targets, a mask for the gradient; results the gradient, if any, log_total, at_target, peak."""
    if asked(frame):
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
    share(job, known(SOFTMAX), dim(logits, 0) // ROWS + 1)
    return 0


@no_type_check
def softmax_task(job: int) -> int:
    """Takes part in `softmax`."""
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
