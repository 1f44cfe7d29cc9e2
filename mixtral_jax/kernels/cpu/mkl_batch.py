"""How a table of products becomes one call of oneMKL's."""

from typing import no_type_check

from mixtral_jax.kernels.cpu.intrinsics import SGEMM_BATCH, allocate, call, known, read, release, write, write_short
from mixtral_jax.kernels.cpu.matmul_calls import ENTRIES, TABLE
from mixtral_jax.kernels.cpu.thread_pool import argument, drop

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of CBLAS
ONE = 0x3F800000  # 1 in float32
NUMBERS = 11  # of a product, beside its addresses


@no_type_check
def multiply_all(job: int) -> int:
    """Computes the products of a job, see `matmul_calls`."""
    count = argument(job, 0)
    add = argument(job, 3)
    memory = allocate(64, (count * (3 * 8 + NUMBERS * 4) + 63) // 64 * 64 + 64)
    numbers = memory + count * 24
    for i in range(count):
        row = job + TABLE + 8 * ENTRIES * i
        for j in range(3):
            write(memory + 8 * (j * count + i), read(row + 8 * j))
        for j in range(6):
            write_short(numbers + 4 * (j * count + i), read(row + 8 * (3 + j)))
        write_short(numbers + 4 * (6 * count + i), TRANSPOSED if argument(job, 1) else PLAIN)
        write_short(numbers + 4 * (7 * count + i), TRANSPOSED if argument(job, 2) else PLAIN)
        write_short(numbers + 4 * (8 * count + i), ONE)
        write_short(numbers + 4 * (9 * count + i), ONE if add else 0)
        write_short(numbers + 4 * (10 * count + i), 1)  # products with these numbers
    if count:
        step = 4 * count
        of_a, of_b, of_out, rows, columns, inner = (
            numbers, numbers + step, numbers + 2 * step, numbers + 3 * step, numbers + 4 * step, numbers + 5 * step,
        )  # fmt: skip
        call(
            known(SGEMM_BATCH),
            (
                ROW_MAJOR, numbers + 6 * step, numbers + 7 * step, rows, columns, inner, numbers + 8 * step,
                memory, of_a, memory + 8 * count, of_b, numbers + 9 * step, memory + 16 * count, of_out,
                count, numbers + 10 * step,
            ),
        )  # fmt: skip
    release(memory)
    drop(job)
    return 0
