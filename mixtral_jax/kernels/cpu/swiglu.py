"""SwiGLU of rows, forward and backward, in one pass over memory by all threads."""

from typing import no_type_check

import jax
from jaxtyping import Array, Float

from mixtral_jax.kernels.cpu.intrinsics import SWIGLU, compiled, read_state, set_state, write
from mixtral_jax.kernels.cpu.simd import differentiate_swiglu_row, swiglu_row
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
from mixtral_jax.kernels.cpu.xla_ffi import answer_version_query, data, dim, operand, register, result
from mixtral_jax.precision import FULL

ROWS = 16  # that a thread takes at a time


def swiglu(gate: Float[Array, "rows d_ff"], up: Float[Array, "rows d_ff"]) -> Float[Array, "rows d_ff"]:
    """Computes silu(gate) * up. Source: arXiv 2002.05202."""
    return jax.ffi.ffi_call("cpu_swiglu", jax.ShapeDtypeStruct(gate.shape, FULL))(gate, up)


def swiglu_gradients(
    gate: Float[Array, "rows d_ff"], up: Float[Array, "rows d_ff"], d_out: Float[Array, "rows d_ff"]
) -> tuple[Float[Array, "rows d_ff"], Float[Array, "rows d_ff"], Float[Array, "rows d_ff"]]:
    """Computes the gradients of gate and up, and `swiglu` again, in the memory of the arguments."""
    results = [jax.ShapeDtypeStruct(x.shape, FULL) for x in (gate, up, d_out)]
    call = jax.ffi.ffi_call("cpu_swiglu_gradients", results, input_output_aliases={i: i for i in range(3)})
    d_gate, d_up, out = call(gate, up, d_out)
    return d_gate, d_up, out


@compiled
@no_type_check
def _run(frame: int, last: int, gradients: bool) -> None:
    """Runs a job of the number of rows, their length, addresses of gate, up and a last array, and which."""
    gate = operand(frame, 0)
    job = new_job(frame, 8 * 6)
    write(job + ARGUMENTS, dim(gate, 0))
    write(job + ARGUMENTS + 8, dim(gate, 1))
    for i in range(2):
        write(job + ARGUMENTS + 8 * (2 + i), data(operand(frame, i)))
    write(job + ARGUMENTS + 32, data(last))
    write(job + ARGUMENTS + 40, gradients)
    run_by_all_threads(job, read_state(SWIGLU), dim(gate, 0) // ROWS + 1)


@no_type_check
def _handle(frame: int) -> int:
    """Operands gate, up; the result is `swiglu`."""
    if answer_version_query(frame):
        return 0
    _run(frame, result(frame, 0), False)
    return 0


@no_type_check
def _handle_gradients(frame: int) -> int:
    """Operands gate, up, d_out; the results lie in their memory."""
    if answer_version_query(frame):
        return 0
    _run(frame, operand(frame, 2), True)
    return 0


@no_type_check
def _task(job: int) -> int:
    """Takes part in either."""
    workspace = begin(job)
    rows, columns = argument(job, 0), argument(job, 1)
    while True:
        first = take_next(job + COUNTER) * ROWS
        if first >= rows:
            break
        for row in range(first, min(rows, first + ROWS)):
            place = 4 * row * columns
            gate, up, last = argument(job, 2) + place, argument(job, 3) + place, argument(job, 4) + place
            if argument(job, 5):
                differentiate_swiglu_row(gate, up, last, columns)
            else:
                swiglu_row(gate, up, last, columns)
    end(job, workspace)
    return 0


set_state(SWIGLU, _task)
register("cpu_swiglu", _handle)
register("cpu_swiglu_gradients", _handle_gradients)
