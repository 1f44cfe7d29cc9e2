"""The foreign functions behind `swiglu`."""

from typing import no_type_check

import numpy as np

from mixtral_jax.kernels.cpu.intrinsics import SWIGLU, compiled, known, view, write
from mixtral_jax.kernels.cpu.simd import differentiate_swiglu_row, swiglu_row
from mixtral_jax.kernels.cpu.thread_pool import ARGUMENTS, COUNTER, argument, begin, end, new_job, share, take_next
from mixtral_jax.kernels.cpu.xla_ffi import asked, data, dim, operand, result

ROWS = 16  # that a thread takes at a time


@compiled
@no_type_check
def _share(frame: int, last: int, gradients: bool) -> None:
    """Shares a job of the number of rows, their length, addresses of gate, up, weights and a last array, and which."""
    gate = operand(frame, 0)
    job = new_job(frame, 8 * 7)
    write(job + ARGUMENTS, dim(gate, 0))
    write(job + ARGUMENTS + 8, dim(gate, 1))
    for i in range(3):
        write(job + ARGUMENTS + 8 * (2 + i), data(operand(frame, i)))
    write(job + ARGUMENTS + 40, data(last))
    write(job + ARGUMENTS + 48, gradients)
    share(job, known(SWIGLU), dim(gate, 0) // ROWS + 1)


@no_type_check
def swiglu(frame: int) -> int:
    """Operands gate, up, weights; the result is `swiglu.swiglu`."""
    if asked(frame):
        return 0
    _share(frame, result(frame, 0), False)
    return 0


@no_type_check
def gradients(frame: int) -> int:
    """Operands gate, up, weights, d_out; the results lie in their memory."""
    if asked(frame):
        return 0
    _share(frame, operand(frame, 3), True)
    return 0


@no_type_check
def swiglu_task(job: int) -> int:
    """Takes part in `swiglu` or `gradients`."""
    workspace = begin(job)
    rows, columns = argument(job, 0), argument(job, 1)
    while True:
        first = take_next(job + COUNTER) * ROWS
        if first >= rows:
            break
        for row in range(first, min(rows, first + ROWS)):
            place, weights = 4 * row * columns, view(argument(job, 4), 1, rows, np.float32)[0]
            gate, up, last = argument(job, 2) + place, argument(job, 3) + place, argument(job, 5) + place
            if argument(job, 6):
                weights[row] = differentiate_swiglu_row(gate, up, weights[row], last, columns)
            else:
                swiglu_row(gate, up, weights[row], last, columns)
    end(job, workspace)
    return 0
