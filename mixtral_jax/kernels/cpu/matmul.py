"""Matrix products that XLA's programs for CPU leave to an engine, in float32, and their derivatives.

Those are faster than XLA's own, most where products are small, transposed or many. They take parts of arrays by
address, so that nothing is cut out, padded or copied together: rows of one expert, one layer of a stack.

An FFI handler lists products, which an engine computes. An engine is a function of a job whose arguments are the number
of products and four flags: whether the first and the second factors are transposed, whether results are added to what
is there, and whether nobody reads them soon. Products follow from TABLE on, each of nine integers: addresses of both
factors and the result; elements from a row to the next in these; rows, columns and the length of the sums.
"""

from collections.abc import Sequence
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.cpu.intrinsics import AMX, THREADS, call, compiled, fill, read, read_short, read_state, write
from mixtral_jax.kernels.cpu.thread_pool import ARGUMENTS, argument, new_job, run_by_all_threads
from mixtral_jax.kernels.cpu.xla_ffi import (
    answer_version_query,
    attribute,
    count_results,
    data,
    dim,
    elements,
    operand,
    register,
    result,
)
from mixtral_jax.precision import EXACT_PRODUCT, FULL
from mixtral_jax.remat import name_dense_product

ENGINES = ("amx", "mkl")
NUMBERS = {engine: np.int64(number) for number, engine in enumerate(ENGINES)}  # places behind AMX
TABLE, ENTRIES = ARGUMENTS + 64, 9
SIZE = 4  # bytes of an element

WIDTH, TALLEST, LEAST = 512, 1024, 128  # columns of a block of a product at most, and rows
HEIGHT = 5  # argument of a job: rows of its blocks

Layer = Int[Array, ""] | Int[np.ndarray, ""]  # number of a layer; a constant of a program is the latter


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "rows inner"], w: Float[Array, "inner outer"], engine: str) -> Float[Array, "rows outer"]:
    """Computes x w."""
    return name_dense_product(multiply(x, w, engine))


def _matmul_fwd(x: Array, w: Array, engine: str) -> tuple[Array, tuple[Array, Array]]:
    return name_dense_product(multiply(x, w, engine)), (x, w)


def _matmul_bwd(engine: str, residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, w = residuals
    return multiply(d_out, w, engine, "nt"), multiply(x, d_out, engine, "tn")


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def exact_matmul(
    x: Float[Array, "rows inner"], w: Float[Array, "inner outer"], engine: str
) -> Float[Array, "rows outer"]:
    """Computes x w in float32's own products, and only the gradients as `matmul` does."""
    return jnp.matmul(x, w, precision=EXACT_PRODUCT)


def _exact_matmul_fwd(x: Array, w: Array, engine: str) -> tuple[Array, tuple[Array, Array]]:
    return exact_matmul(x, w, engine), (x, w)


exact_matmul.defvjp(_exact_matmul_fwd, _matmul_bwd)


def multiply(
    a: Float[Array, "*leading a_rows a_columns"], b: Float[Array, "*leading b_rows b_columns"], engine: str,
    transposes: str = "nn",
) -> Float[Array, "*leading rows columns"]:  # fmt: skip
    """Computes a b, a b^T (`nt`) or a^T b (`tn`) of matrices, one by one over equal leading axes."""
    turn_a, turn_b = (np.int64(flag == "t") for flag in transposes)
    rows, columns = a.shape[-1 if turn_a else -2], b.shape[-2 if turn_b else -1]
    call = jax.ffi.ffi_call("cpu_multiply", jax.ShapeDtypeStruct((*a.shape[:-2], rows, columns), FULL))
    return call(a, b, add=np.int64(0), engine=NUMBERS[engine], turn_a=turn_a, turn_b=turn_b)


def add_product(
    total: Float[Array, "inner outer"], a: Float[Array, "rows inner"], b: Float[Array, "rows outer"], engine: str
) -> Float[Array, "inner outer"]:
    """Computes total + a^T b, in the memory of `total` if nobody else needs it."""
    call = jax.ffi.ffi_call("cpu_multiply", _like(total), input_output_aliases={2: 0})
    return call(a, b, total, add=np.int64(1), engine=NUMBERS[engine], turn_a=np.int64(1), turn_b=np.int64(0))


def grouped(
    rows: Float[Array, "rows inner"],
    group_sizes: Int[Array, " experts"],
    layer: Layer,
    stacks: Sequence[Float[Array, "layers experts a b"]],
    engine: str,
    transposed: bool = False,
) -> list[Float[Array, "rows outer"]]:
    """Multiplies rows, sorted by expert, with their expert's matrix (or its transpose) in one layer of each stack.

    Padding rows, behind the last expert's, become zero.
    """
    outer = stacks[0].shape[2 if transposed else 3]
    shapes = [jax.ShapeDtypeStruct((rows.shape[0], outer), FULL)] * len(stacks)
    call = jax.ffi.ffi_call("cpu_grouped", shapes)
    engine_number, turn_b = NUMBERS[engine], np.int64(transposed)
    return list(call(rows, group_sizes, layer, *stacks, add=np.int64(0), engine=engine_number, turn_b=turn_b))


def grouped_add(
    total: Float[Array, "rows outer"],
    rows: Float[Array, "rows inner"],
    group_sizes: Int[Array, " experts"],
    layer: Layer,
    stack: Float[Array, "layers experts outer inner"],
    engine: str,
) -> Float[Array, "rows outer"]:
    """Adds `grouped` with transposed matrices to a total, in place."""
    call = jax.ffi.ffi_call("cpu_grouped", [_like(total)], input_output_aliases={4: 0})
    engine_number = NUMBERS[engine]
    return call(rows, group_sizes, layer, stack, total, add=np.int64(1), engine=engine_number, turn_b=np.int64(1))[0]


def outer_products(
    rows: Float[Array, "rows inner"],
    d_rows: Sequence[Float[Array, "rows outer"]],
    group_sizes: Int[Array, " experts"],
    engine: str,
) -> list[Float[Array, "experts inner outer"]]:
    """Computes rows^T d_rows of every expert."""
    experts, inner = group_sizes.shape[0], rows.shape[1]
    shapes = [jax.ShapeDtypeStruct((experts, inner, d.shape[1]), FULL) for d in d_rows]
    return list(jax.ffi.ffi_call("cpu_outer_products", shapes)(rows, group_sizes, *d_rows, engine=NUMBERS[engine]))


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


@compiled
@no_type_check
def _begin(frame: int, products: int) -> int:
    return new_job(frame, TABLE - ARGUMENTS + 8 * ENTRIES * products)


@compiled
@no_type_check
def _list(job: int, product: tuple[int, ...]) -> None:
    """Lists a product, given as its nine integers, if it is one of anything."""
    rows, columns, inner = product[6:]
    if rows and columns and inner:
        count = argument(job, 0)
        place = job + TABLE + 8 * ENTRIES * count
        for i, value in enumerate(product):
            write(place + 8 * i, value)
        write(job + ARGUMENTS, count + 1)


@compiled
@no_type_check
def _compute(job: int, engine: int, turn_a: int, turn_b: int, add: int, stream: int) -> None:
    for i, flag in enumerate((turn_a, turn_b, add, stream)):
        write(job + ARGUMENTS + 8 * (i + 1), flag)
    call(read_state(AMX + engine), (job,))


@compiled
@no_type_check
def by_blocks(job: int, task: int) -> None:
    """Lets all threads compute the products of a job by blocks, see `run_by_all_threads`."""
    height = TALLEST
    while True:
        blocks = 0
        for i in range(argument(job, 0)):
            row = job + TABLE + 8 * ENTRIES * i
            blocks += -(-read(row + 48) // height) * -(-read(row + 56) // WIDTH)
        if blocks >= read_state(THREADS) or height == LEAST:
            break
        height //= 2
    write(job + ARGUMENTS + 8 * HEIGHT, height)
    run_by_all_threads(job, task, blocks)


@no_type_check
def _handle_multiply(frame: int) -> int:
    """Multiplies matrices one by one; operands: first and second factors, the total where `add` is set."""
    if answer_version_query(frame):
        return 0
    add, engine, turn_a, turn_b = attribute(frame, 0), attribute(frame, 1), attribute(frame, 2), attribute(frame, 3)
    a, b, out = operand(frame, 0), operand(frame, 1), result(frame, 0)
    rows, columns, inner = dim(out, -2), dim(out, -1), dim(a, -2 if turn_a else -1)
    count = elements(out) // max(1, rows * columns)
    job = _begin(frame, count)
    for i in range(count):
        _list(
            job,
            (data(a) + SIZE * i * rows * inner, data(b) + SIZE * i * inner * columns,
             data(out) + SIZE * i * rows * columns, dim(a, -1), dim(b, -1), columns, rows, columns, inner),
        )  # fmt: skip
    _compute(job, engine, turn_a, turn_b, add, 0)
    return 0


@no_type_check
def _handle_grouped(frame: int) -> int:
    """Multiplies rows by their experts' matrices; operands: rows, group sizes, layer, stacks, a total for `add`."""
    if answer_version_query(frame):
        return 0
    add, engine, turn_b = attribute(frame, 0), attribute(frame, 1), attribute(frame, 2)
    rows, sizes, layer = operand(frame, 0), operand(frame, 1), read_short(data(operand(frame, 2)))
    experts, inner, outer = dim(sizes, 0), dim(rows, 1), dim(result(frame, 0), 1)
    job = _begin(frame, experts * count_results(frame))
    for i in range(count_results(frame)):
        stack, out, start = operand(frame, 3 + i), result(frame, i), 0
        matrix = data(stack) + SIZE * layer * experts * inner * outer
        for expert in range(experts):
            size = read_short(data(sizes) + 4 * expert)
            _list(
                job,
                (data(rows) + SIZE * start * inner, matrix + SIZE * expert * inner * outer,
                 data(out) + SIZE * start * outer, inner, dim(stack, 3), outer, size, outer, inner),
            )  # fmt: skip
            start += size
        if not add:
            fill(data(out) + SIZE * start * outer, 0, SIZE * (dim(rows, 0) - start) * outer)
    _compute(job, engine, 0, turn_b, add, 0)
    return 0


@no_type_check
def _handle_outer_products(frame: int) -> int:
    """Multiplies the experts' rows by others; operands: rows, group sizes, the others."""
    if answer_version_query(frame):
        return 0
    engine, count = attribute(frame, 0), count_results(frame)
    rows, sizes = operand(frame, 0), operand(frame, 1)
    experts, inner = dim(sizes, 0), dim(rows, 1)
    job = _begin(frame, experts * count)
    for i in range(count):
        others, start = operand(frame, 2 + i), 0
        outer = dim(others, 1)
        for expert in range(experts):
            size = read_short(data(sizes) + 4 * expert)
            out = data(result(frame, i)) + SIZE * expert * inner * outer
            if size == 0:
                fill(out, 0, SIZE * inner * outer)
            _list(
                job,
                (data(rows) + SIZE * start * inner, data(others) + SIZE * start * outer, out,
                 inner, outer, outer, inner, outer, size),
            )  # fmt: skip
            start += size
    _compute(job, engine, 1, 0, 0, 1)
    return 0


register("cpu_multiply", _handle_multiply)
register("cpu_grouped", _handle_grouped)
register("cpu_outer_products", _handle_outer_products)
