"""The foreign functions behind `matmul`: each lists products, which an engine computes.

An engine is a function of a job whose arguments are the number of products and four flags: whether the first and the
second factors are transposed, whether results are added to what is there, and whether nobody reads them soon. Products
follow from TABLE on, each of nine integers: addresses of both factors and the result; elements from a row to the next
in these; rows, columns and the length of the sums.
"""

from typing import no_type_check

from mixtral_jax.kernels.cpu.intrinsics import AMX, call, compiled, fill, known, read_short, write
from mixtral_jax.kernels.cpu.thread_pool import ARGUMENTS, argument, new_job
from mixtral_jax.kernels.cpu.xla_ffi import asked, attribute, count_results, data, dim, elements, operand, result

TABLE, ENTRIES = ARGUMENTS + 64, 9
SIZE = 4  # bytes of an element


@compiled
@no_type_check
def _begin(frame: int, products: int) -> int:
    return new_job(frame, TABLE - ARGUMENTS + 8 * ENTRIES * products)


@compiled
@no_type_check
def _list(
    job: int, a: int, b: int, out: int, of_a: int, of_b: int, of_out: int, rows: int, columns: int, inner: int
) -> None:
    """Lists a product, if it is one of anything."""
    if rows and columns and inner:
        count = argument(job, 0)
        place = job + TABLE + 8 * ENTRIES * count
        for i, value in enumerate((a, b, out, of_a, of_b, of_out, rows, columns, inner)):
            write(place + 8 * i, value)
        write(job + ARGUMENTS, count + 1)


@compiled
@no_type_check
def _compute(job: int, engine: int, turn_a: int, turn_b: int, add: int, stream: int) -> None:
    for i, flag in enumerate((turn_a, turn_b, add, stream)):
        write(job + ARGUMENTS + 8 * (i + 1), flag)
    call(known(AMX + engine), (job,))


@no_type_check
def multiply(frame: int) -> int:
    """Multiplies matrices one by one; operands: first and second factors, the total where `add` is set."""
    if asked(frame):
        return 0
    add, engine, turn_a, turn_b = attribute(frame, 0), attribute(frame, 1), attribute(frame, 2), attribute(frame, 3)
    a, b, out = operand(frame, 0), operand(frame, 1), result(frame, 0)
    rows, columns, inner = dim(out, -2), dim(out, -1), dim(a, -2 if turn_a else -1)
    count = elements(out) // max(1, rows * columns)
    job = _begin(frame, count)
    for i in range(count):
        _list(
            job,
            data(a) + SIZE * i * rows * inner, data(b) + SIZE * i * inner * columns,
            data(out) + SIZE * i * rows * columns, dim(a, -1), dim(b, -1), columns, rows, columns, inner,
        )  # fmt: skip
    _compute(job, engine, turn_a, turn_b, add, 0)
    return 0


@no_type_check
def grouped(frame: int) -> int:
    """Multiplies rows by their experts' matrices; operands: rows, group sizes, layer, stacks, a total for `add`."""
    if asked(frame):
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
                data(rows) + SIZE * start * inner, matrix + SIZE * expert * inner * outer,
                data(out) + SIZE * start * outer, inner, dim(stack, 3), outer, size, outer, inner,
            )  # fmt: skip
            start += size
        if not add:
            fill(data(out) + SIZE * start * outer, 0, SIZE * (dim(rows, 0) - start) * outer)
    _compute(job, engine, 0, turn_b, add, 0)
    return 0


@no_type_check
def outer_products(frame: int) -> int:
    """Multiplies the experts' rows by others; operands: rows, group sizes, layer, the others, stacks of the results."""
    if asked(frame):
        return 0
    engine, count = attribute(frame, 0), count_results(frame)
    rows, sizes, layer = operand(frame, 0), operand(frame, 1), read_short(data(operand(frame, 2)))
    experts, inner = dim(sizes, 0), dim(rows, 1)
    job = _begin(frame, experts * count)
    for i in range(count):
        others, start = operand(frame, 3 + i), 0
        outer = dim(others, 1)
        for expert in range(experts):
            size = read_short(data(sizes) + 4 * expert)
            out = data(result(frame, i)) + SIZE * (layer * experts + expert) * inner * outer
            if size == 0:
                fill(out, 0, SIZE * inner * outer)
            _list(
                job,
                data(rows) + SIZE * start * inner, data(others) + SIZE * start * outer, out,
                inner, outer, outer, inner, outer, size,
            )  # fmt: skip
            start += size
    _compute(job, engine, 1, 0, 0, 1)
    return 0
