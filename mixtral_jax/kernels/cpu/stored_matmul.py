"""Products of rows with weights that are read once, as they are stored: float32, bfloat16 or int8 with scales.

For decoding, where a few rows meet many weights and reading these is all the work. A thread takes some columns of a
matrix and goes down them, DEPTH rows of weights at a time, which then wait in its cache for the next rows of factors.
Many rows meet panels of the matrix, see `stored_panel`. Sums are float32 and in the order of the weights, whoever
computes them and whatever other rows there are.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from llvmlite import binding
from numba.core import cgutils

from mixtral_jax.kernels.cpu.intrinsics import (
    I64,
    STORED,
    THREADS,
    Builder,
    Value,
    compiled,
    emits,
    fill,
    pointer,
    read,
    read_short,
    read_state,
    set_state,
    write,
)
from mixtral_jax.kernels.cpu.matmul import SIZE, Layer
from mixtral_jax.kernels.cpu.simd import (
    FLOAT,
    FLOATS,
    call,
    chunks_of,
    load_masked,
    load_vector,
    shuffle,
    spread,
    store_masked,
    store_vector,
)
from mixtral_jax.kernels.cpu.stored_panel import (
    DEEP,
    EIGHTH,
    HALF,
    ORDER,
    WIDE,
    fill_panel,
    first_lanes,
    load_pairs,
    load_weights,
    multiply_panel,
    prefetch,
)
from mixtral_jax.kernels.cpu.swiglu import swiglu
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
from mixtral_jax.kernels.stored import Matrices, StoredExperts
from mixtral_jax.precision import FULL

DEPTH, HEIGHT = 8, 4  # rows of weights and of factors that are multiplied together
WIDEST, NARROWEST = 512, 64  # columns that a thread takes
TABLE, ENTRIES = ARGUMENTS + 64, 7
# Rows that meet weights where these lie; more meet a panel of them. AVX-512 widens bfloat16 as it is read at no cost.
FEW = {WIDE: 12, HALF: 32 if binding.get_host_cpu_features().get("avx512f") else 4, EIGHTH: 4}


def multiply_stored(
    rows: Float[Array, "rows inner"], group_sizes: Int[Array, " experts"], layer: Layer, stacks: Sequence[Matrices]
) -> list[Float[Array, "rows outer"]]:
    """Multiplies rows, sorted by expert, with their expert's matrix in one layer of each stack.

    Args:
        rows: float32.
        group_sizes: rows of each expert; those behind the last expert's are padding and become zero.
        layer: its number in the stacks.
        stacks: all of one type.

    Returns:
        Products with each stack.
    """
    kind = stacks[0].values.dtype.itemsize
    shapes = [jax.ShapeDtypeStruct((rows.shape[0], stack.values.shape[3]), FULL) for stack in stacks]
    operands = [part for stack in stacks for part in stack if part is not None]
    call = jax.ffi.ffi_call("cpu_stored", shapes)
    return list(call(rows, group_sizes, layer, *operands, kind=np.int64(kind)))


def stored_ffn(
    rows: Float[Array, "rows d_model"], group_sizes: Int[Array, " experts"], experts: StoredExperts
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert; see `expert_ffn`."""
    gate, up = multiply_stored(rows.astype(FULL), group_sizes, experts.layer, (experts.w_gate, experts.w_up))
    (out,) = multiply_stored(swiglu(gate, up), group_sizes, experts.layer, (experts.w_down,))
    return out.astype(rows.dtype)


@emits()
def _add_products(
    b: Builder, out: Value, x: Value, inner: Value, w: Value, outer: Value, columns: Value, ahead: Value,
    kind: int, rows: int, depth: int,
) -> None:  # fmt: skip
    """Adds products of some rows of factors with some rows of weights to some columns of the results.

    Meanwhile it fetches memory `ahead` bytes behind the weights. Of bfloat16 the results are in the order of `ORDER`.
    """
    of_x, of_w, of_out = b.shl(inner, I64(2)), b.mul(outer, I64(kind)), b.shl(outer, I64(2))
    place = lambda start, stride, i: b.add(start, b.mul(stride, I64(i)))  # noqa: E731
    factors = [
        [
            spread(b, b.load(pointer(b, b.add(place(x, of_x, row), I64(4 * k)), FLOAT)), FLOATS) for k in range(depth)
        ]
        for row in range(rows)
    ]  # fmt: skip
    weights, results = [place(w, of_w, k) for k in range(depth)], [place(out, of_out, row) for row in range(rows)]

    def add(offset: Value, there: Value | None) -> None:
        totals = [
            b.load(pointer(b, b.add(result, offset), FLOATS), align=4) if there is None
            else load_masked(b, b.add(result, offset), there, 0.0)
            for result in results
        ]  # fmt: skip
        for k in range(depth):
            address = b.add(weights[k], b.lshr(offset, I64({WIDE: 0, HALF: 1, EIGHTH: 2}[kind])))
            own = load_pairs(b, address) if kind == HALF and there is None else load_weights(b, address, kind, there)
            if there is None:
                prefetch(b, b.add(address, ahead))
            totals = [call(b, "fma", own, factors[row][k], total) for row, total in enumerate(totals)]
        for total, of_row in zip(totals, results, strict=True):
            if there is None:
                b.store(total, pointer(b, b.add(of_row, offset), FLOATS), align=4)
            else:
                store_masked(b, total, b.add(of_row, offset), there)

    whole = b.lshr(columns, I64(4))
    with cgutils.for_range(b, whole) as loop:
        add(b.shl(loop.index, I64(6)), None)
    left = b.and_(columns, I64(15))
    with b.if_then(b.icmp_signed(">", left, I64(0))):
        add(b.shl(whole, I64(6)), first_lanes(b, left))


@emits()
def _put_in_order(b: Builder, out: Value, columns: Value) -> None:
    """Brings a row of results from the order of `ORDER` to their own; those of a last part are in it."""
    with cgutils.for_range(b, b.lshr(columns, I64(4))) as loop:
        place = b.add(out, b.shl(loop.index, I64(6)))
        values = load_vector(b, place)
        store_vector(b, shuffle(b, values, values, [ORDER.index(i) for i in range(16)]), place)


@emits()
def _scale(b: Builder, out: Value, scale: Value, columns: Value) -> None:
    """Multiplies a row of results with the scales of its columns."""
    with chunks_of(b, columns) as (offset, there):
        place = b.add(out, offset)
        numbers = [load_masked(b, address, there, 0.0) for address in (place, b.add(scale, offset))]
        store_masked(b, b.fmul(*numbers), place, there)


def _column_block(kind: int) -> Any:
    """Makes the function for weights of one kind."""
    few = FEW[kind]

    @compiled
    @no_type_check
    def compute(place: int, left: int, columns: int, panel: int) -> None:
        """Computes some columns of a product of the table."""
        w, scale, x, out = read(place), read(place + 8), read(place + 16), read(place + 24) + SIZE * left
        rows, outer, inner = read(place + 32), read(place + 40), read(place + 48)
        for row in range(rows):
            fill(out + SIZE * row * outer, 0, SIZE * columns)
        k = 0
        while rows > few and k < inner:
            depth, own = min(DEEP, inner - k), w + kind * (k * outer + left)
            fill_panel(panel, own, outer, depth, columns, kind)
            multiply_panel(panel, place, left, columns, k, own, kind)
            k += depth
        while k < inner:
            deep, own, row = inner - k >= DEPTH, w + kind * (k * outer + left), 0
            ahead = kind * outer * DEPTH if inner - k > DEPTH else 0  # to ask for what is no memory takes long
            while row < rows:
                of_out, of_x = out + SIZE * row * outer, x + SIZE * (row * inner + k)
                if not deep:
                    _add_products(of_out, of_x, inner, own, outer, columns, ahead, kind, 1, 1)
                    row += 1
                elif rows - row >= HEIGHT:
                    _add_products(of_out, of_x, inner, own, outer, columns, ahead, kind, HEIGHT, DEPTH)
                    row += HEIGHT
                elif rows - row > 1:
                    _add_products(of_out, of_x, inner, own, outer, columns, ahead, kind, 2, DEPTH)
                    row += 2
                else:
                    _add_products(of_out, of_x, inner, own, outer, columns, ahead, kind, 1, DEPTH)
                    row += 1
            k += DEPTH if deep else 1
        if kind == HALF and rows <= few:
            for row in range(rows):
                _put_in_order(out + SIZE * row * outer, columns)
        if scale:
            for row in range(rows):
                _scale(out + SIZE * row * outer, scale + SIZE * left, columns)

    return compute


_wide, _half, _eighth = _column_block(WIDE), _column_block(HALF), _column_block(EIGHTH)


@no_type_check
def _handle(frame: int) -> int:
    """Operands: rows, group sizes, layer, and of each stack the values and, for int8, the scales."""
    if answer_version_query(frame):
        return 0
    kind, count = attribute(frame, 0), count_results(frame)
    rows, sizes, layer = operand(frame, 0), operand(frame, 1), read_short(data(operand(frame, 2)))
    experts, inner = dim(sizes, 0), dim(rows, 1)
    job = new_job(frame, TABLE - ARGUMENTS + 8 * ENTRIES * experts * count)
    products, columns = 0, 0
    for i in range(count):
        stack, out, start = operand(frame, 3 + (2 * i if kind == EIGHTH else i)), result(frame, i), 0
        outer = dim(out, 1)
        for expert in range(experts):
            size, matrix = read_short(data(sizes) + 4 * expert), layer * experts + expert
            if size:
                place = job + TABLE + 8 * ENTRIES * products
                write(place, data(stack) + kind * matrix * inner * outer)
                write(place + 8, data(operand(frame, 4 + 2 * i)) + SIZE * matrix * outer if kind == EIGHTH else 0)
                write(place + 16, data(rows) + SIZE * start * inner)
                write(place + 24, data(out) + SIZE * start * outer)
                write(place + 32, size)
                write(place + 40, outer)
                write(place + 48, inner)
                products, columns = products + 1, columns + outer
                start += size
        fill(data(out) + SIZE * start * outer, 0, SIZE * (dim(rows, 0) - start) * outer)
    width = WIDEST
    while width > NARROWEST and columns < 4 * width * read_state(THREADS):
        width //= 2
    write(job + ARGUMENTS, products)
    write(job + ARGUMENTS + 8, kind)
    write(job + ARGUMENTS + 16, width)
    run_by_all_threads(job, read_state(STORED), columns // width + products)
    return 0


@no_type_check
def _task(job: int) -> int:
    """Takes part in `_handle`."""
    workspace = begin(job)
    products, kind, width, product, passed = argument(job, 0), argument(job, 1), argument(job, 2), 0, 0
    while True:
        block = take_next(job + COUNTER)
        while product < products:
            outer = read(job + TABLE + 8 * ENTRIES * product + 40)
            blocks = -(-outer // width)
            if block < passed + blocks:
                break
            product, passed = product + 1, passed + blocks
        if product == products:
            break
        place, left = job + TABLE + 8 * ENTRIES * product, (block - passed) * width
        columns = min(width, outer - left)
        if kind == WIDE:
            _wide(place, left, columns, workspace)
        elif kind == HALF:
            _half(place, left, columns, workspace)
        else:
            _eighth(place, left, columns, workspace)
    end(job, workspace)
    return 0


set_state(STORED, _task)
register("cpu_stored", _handle)
