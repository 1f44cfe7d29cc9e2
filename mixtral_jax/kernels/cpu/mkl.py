"""Products of Intel's oneMKL, an engine of `matmul`, block by block on XLA's threads.

The library's own threads would share a product as they come and so give other bits from one time to the next.
"""

import ctypes
import functools
import importlib.metadata
from ctypes import c_void_p
from typing import no_type_check

from mixtral_jax.kernels.cpu.intrinsics import (
    MKL,
    MKL_BLOCKS,
    SGEMM_BATCH,
    call,
    read,
    read_state,
    set_state,
    write,
    write_short,
)
from mixtral_jax.kernels.cpu.matmul import ENTRIES, HEIGHT, TABLE, WIDTH, by_blocks
from mixtral_jax.kernels.cpu.thread_pool import COUNTER, argument, begin, end, take_next

LP64, SEQUENTIAL = 0, 1  # MKL_INTERFACE_LP64, MKL_THREADING_SEQUENTIAL
REPRODUCIBLE = 2  # MKL_CBWR_AUTO: the same bits, however memory is aligned
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of CBLAS
ONE = 0x3F800000  # 1 in float32


@functools.cache
def load() -> bool:
    """Loads the library; False where the package `mkl` is missing."""
    try:
        files = importlib.metadata.files("mkl") or ()
        path = next(file for file in sorted(files) if file.name.startswith("libmkl_rt.so"))
        mkl = ctypes.CDLL(str(path.locate()), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, StopIteration, OSError):
        return False
    mkl.MKL_Set_Interface_Layer(LP64)
    mkl.MKL_Set_Threading_Layer(SEQUENTIAL)
    mkl.MKL_CBWR_Set(REPRODUCIBLE)
    set_state(SGEMM_BATCH, ctypes.cast(mkl.cblas_sgemm_batch, c_void_p).value)
    set_state(MKL, _multiply_all)
    set_state(MKL_BLOCKS, _work)
    return True


@no_type_check
def _multiply_all(job: int) -> int:
    """Computes the products of a job, see `matmul`."""
    by_blocks(job, read_state(MKL_BLOCKS))
    return 0


@no_type_check
def _work(job: int) -> int:
    """Takes part in a job of `_multiply_all`: the library gets a block at a time."""
    memory = begin(job)
    count, height = argument(job, 0), argument(job, HEIGHT)
    turn_a, turn_b = argument(job, 1), argument(job, 2)
    numbers = memory + 3 * 8
    write_short(numbers + 24, TRANSPOSED if turn_a else PLAIN)
    write_short(numbers + 28, TRANSPOSED if turn_b else PLAIN)
    write_short(numbers + 32, ONE)
    write_short(numbers + 36, ONE if argument(job, 3) else 0)
    write_short(numbers + 40, 1)  # products with these numbers
    product, passed = 0, 0
    while True:
        block = take_next(job + COUNTER)
        while product < count:
            row = job + TABLE + 8 * ENTRIES * product
            rows, columns = read(row + 48), read(row + 56)
            across = -(-columns // WIDTH)
            blocks = -(-rows // height) * across
            if block < passed + blocks:
                break
            product, passed = product + 1, passed + blocks
        if product == count:
            break
        width = -(-columns // across // 32) * 32
        top, left = (block - passed) // across * height, (block - passed) % across * width
        of_a, of_b, of_out = read(row + 24), read(row + 32), read(row + 40)
        write(memory, read(row) + 4 * top * (1 if turn_a else of_a))
        write(memory + 8, read(row + 8) + 4 * left * (of_b if turn_b else 1))
        write(memory + 16, read(row + 16) + 4 * (top * of_out + left))
        for i, number in enumerate(
            (of_a, of_b, of_out, min(height, rows - top), min(width, columns - left), read(row + 64))
        ):
            write_short(numbers + 4 * i, number)
        call(
            read_state(SGEMM_BATCH),
            (
                ROW_MAJOR, numbers + 24, numbers + 28, numbers + 12, numbers + 16, numbers + 20, numbers + 32,
                memory, numbers, memory + 8, numbers + 4, numbers + 36, memory + 16, numbers + 8, 1, numbers + 40,
            ),
        )  # fmt: skip
    end(job, memory)
    return 0
