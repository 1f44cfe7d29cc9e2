"""Products of Intel's oneMKL, an engine of `matmul`. Its threads are TBB's, which do not spin while XLA computes."""

import ctypes
import functools
import importlib.metadata
from ctypes import c_void_p
from typing import Any, no_type_check

from mixtral_jax.kernels.cpu.intrinsics import (
    MKL,
    SGEMM_BATCH,
    allocate,
    call,
    read,
    read_state,
    release,
    set_state,
    write,
    write_short,
)
from mixtral_jax.kernels.cpu.matmul import ENTRIES, TABLE
from mixtral_jax.kernels.cpu.thread_pool import argument, release_job

LP64, TBB = 0, 3  # MKL_INTERFACE_LP64, MKL_THREADING_TBB
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of CBLAS
ONE = 0x3F800000  # 1 in float32
NUMBERS = 11  # of a product, beside its addresses


@functools.cache
def load() -> bool:
    """Loads the library; False where the package `mkl` is missing."""
    try:
        _load("tbb", "libtbb.so.")
        mkl = _load("mkl", "libmkl_rt.so")
    except (ImportError, StopIteration, OSError):
        return False
    mkl.MKL_Set_Interface_Layer(LP64)
    mkl.MKL_Set_Threading_Layer(TBB)
    set_state(SGEMM_BATCH, ctypes.cast(mkl.cblas_sgemm_batch, c_void_p).value)
    set_state(MKL, _multiply_all)
    return True


def _load(package: str, name: str) -> Any:
    files = importlib.metadata.files(package) or ()
    path = next(file for file in sorted(files) if file.name.startswith(name))
    return ctypes.CDLL(str(path.locate()), mode=ctypes.RTLD_GLOBAL)


@no_type_check
def _multiply_all(job: int) -> int:
    """Computes the products of a job, see `matmul`."""
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
            read_state(SGEMM_BATCH),
            (
                ROW_MAJOR, numbers + 6 * step, numbers + 7 * step, rows, columns, inner, numbers + 8 * step,
                memory, of_a, memory + 8 * count, of_b, numbers + 9 * step, memory + 16 * count, of_out,
                count, numbers + 10 * step,
            ),
        )  # fmt: skip
    release(memory)
    release_job(job)
    return 0
