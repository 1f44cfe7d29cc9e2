"""AdamW in place and in one pass over memory by all threads, where XLA for CPU passes 11 times and 7 are needed."""

import math
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mixtral_jax.kernels.adamw import AdamW
from mixtral_jax.kernels.cpu.intrinsics import SUM_SQUARES, UPDATE, compiled, read_state, set_state, view, write
from mixtral_jax.kernels.cpu.simd import dot_row
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
    count_operands,
    data,
    elements,
    operand,
    register,
    result,
)
from mixtral_jax.precision import FULL

SUMMED = 1 << 14  # elements whose squares are summed in one order
BLOCK = 1 << 16  # elements that a thread takes at a time
NUMBERS = 11  # whether an update is wanted, and `AdamW`


def update_in_place(
    params: Float[Array, "..."],
    mean: Float[Array, "..."],
    square: Float[Array, "..."],
    grads: Float[Array, "..."],
    factors: AdamW,
    wanted: Bool[Array, ""],
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Computes `kernels.adamw.update` over the memory of parameters and moments."""
    packed = jnp.stack([jnp.asarray(x, FULL) for x in (wanted, *factors)])
    results = [jax.ShapeDtypeStruct(x.shape, FULL) for x in (params, mean, square)]
    call = jax.ffi.ffi_call("cpu_adamw", results, input_output_aliases={0: 0, 2: 1, 3: 2})
    new_params, new_mean, new_square = call(params, grads, mean, square, packed)
    return new_params, new_mean, new_square


def global_norm(arrays: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """Computes the root of the sum of the squares of all elements."""
    blocks = sum(-(-x.size // SUMMED) for x in arrays)
    return jnp.sqrt(jnp.sum(jax.ffi.ffi_call("cpu_sum_squares", jax.ShapeDtypeStruct((blocks,), FULL))(*arrays)))


@compiled
@no_type_check
def _update_block(
    params: np.ndarray, grads: np.ndarray, mean: np.ndarray, square: np.ndarray, numbers: np.ndarray
) -> None:
    _, rate, clip, of_mean, of_square, beta1, beta2, rest1, rest2, eps, decay = numbers
    for i in range(params.size):
        grad = grads[i] * clip
        first = beta1 * mean[i] + rest1 * grad
        second = beta2 * square[i] + rest2 * grad * grad
        mean[i], square[i] = first, second
        params[i] -= rate * (first * of_mean / (math.sqrt(second * of_square) + eps) + decay * params[i])


@no_type_check
def _handle(frame: int) -> int:
    """Operands: parameters, gradients, both moments, numbers; the first and the moments are updated in place."""
    if answer_version_query(frame):
        return 0
    numbers = operand(frame, 4)
    if view(data(numbers), 1, NUMBERS, np.float32)[0, 0]:
        job = new_job(frame, 8 * 5 + 4 * NUMBERS)
        write(job + ARGUMENTS, elements(operand(frame, 0)))
        for i in range(4):
            write(job + ARGUMENTS + 8 * (i + 1), data(operand(frame, i)))
        view(job + ARGUMENTS + 40, 1, NUMBERS, np.float32)[:] = view(data(numbers), 1, NUMBERS, np.float32)
        run_by_all_threads(job, read_state(UPDATE), elements(operand(frame, 0)) // BLOCK + 1)
    return 0


@no_type_check
def _task(job: int) -> int:
    """Takes part in `_handle`."""
    workspace = begin(job)
    numbers = view(job + ARGUMENTS + 40, 1, NUMBERS, np.float32)[0]
    while True:
        start = take_next(job + COUNTER) * BLOCK
        if start >= argument(job, 0):
            break
        length = min(BLOCK, argument(job, 0) - start)
        params, grads, mean, square = (
            view(argument(job, 1) + 4 * start, 1, length, np.float32)[0],
            view(argument(job, 2) + 4 * start, 1, length, np.float32)[0],
            view(argument(job, 3) + 4 * start, 1, length, np.float32)[0],
            view(argument(job, 4) + 4 * start, 1, length, np.float32)[0],
        )
        _update_block(params, grads, mean, square, numbers)
    end(job, workspace)
    return 0


@no_type_check
def _handle_sum(frame: int) -> int:
    """Operands: any arrays; the result is one sum for every SUMMED elements of each."""
    if answer_version_query(frame):
        return 0
    count = count_operands(frame)
    job = new_job(frame, 8 * (2 + 2 * count))
    write(job + ARGUMENTS, count)
    write(job + ARGUMENTS + 8, data(result(frame, 0)))
    for i in range(count):
        write(job + ARGUMENTS + 8 * (2 + 2 * i), data(operand(frame, i)))
        write(job + ARGUMENTS + 8 * (3 + 2 * i), elements(operand(frame, i)))
    run_by_all_threads(job, read_state(SUM_SQUARES), elements(result(frame, 0)))
    return 0


@no_type_check
def _sum_task(job: int) -> int:
    """Takes part in `_handle_sum`."""
    workspace = begin(job)
    array, passed = 0, 0
    while True:
        block = take_next(job + COUNTER)
        while array < argument(job, 0):
            blocks = (argument(job, 3 + 2 * array) + SUMMED - 1) // SUMMED
            if block < passed + blocks:
                break
            array, passed = array + 1, passed + blocks
        if array == argument(job, 0):
            break
        start = (block - passed) * SUMMED
        numbers = argument(job, 2 + 2 * array) + 4 * start
        dot_row(argument(job, 1) + 4 * block, numbers, numbers, min(SUMMED, argument(job, 3 + 2 * array) - start))
    end(job, workspace)
    return 0


set_state(UPDATE, _task)
set_state(SUM_SQUARES, _sum_task)
register("cpu_adamw", _handle)
register("cpu_sum_squares", _handle_sum)
