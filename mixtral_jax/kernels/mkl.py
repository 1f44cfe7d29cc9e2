"""Products of Intel's oneMKL. Its threads are those of TBB, which do not spin while XLA computes."""

import ctypes
import functools
import importlib.metadata
from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p
from typing import Any

import numpy as np

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of CBLAS
LP64, TBB = 0, 3  # MKL_INTERFACE_LP64, MKL_THREADING_TBB


def load() -> Callable[[np.ndarray, bool, bool, bool], None] | None:
    """Loads the library.

    Returns:
        What computes a table of products, see `host_products.Multiply`; None where the package `mkl` is not installed.
    """
    try:
        _load("tbb", "libtbb.so.")
        mkl = _load("mkl", "libmkl_rt.so")
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        return None
    mkl.MKL_Set_Interface_Layer(LP64)
    mkl.MKL_Set_Threading_Layer(TBB)
    matrix = [c_void_p, c_int]
    mkl.cblas_sgemm.argtypes = [*[c_int] * 6, c_float, *matrix, *matrix, c_float, *matrix]
    mkl.cblas_sgemm_batch.argtypes = [c_int, *[c_void_p] * 13, c_int, c_void_p]
    mkl.cblas_sgemm.restype = mkl.cblas_sgemm_batch.restype = None
    return functools.partial(_multiply_all, mkl)


def _load(package: str, name: str) -> Any:
    files = importlib.metadata.files(package) or ()
    path = next(file for file in sorted(files) if file.name.startswith(name))
    return ctypes.CDLL(str(path.locate()), mode=ctypes.RTLD_GLOBAL)


def _multiply_all(mkl: Any, table: np.ndarray, turn_a: bool, turn_b: bool, add: bool) -> None:
    flags = [TRANSPOSED if turn else PLAIN for turn in (turn_a, turn_b)]
    count = len(table)
    if not count:
        return
    if count == 1:
        (a, b, out, of_a, of_b, of_out, *shape) = table[0].tolist()
        mkl.cblas_sgemm(ROW_MAJOR, *flags, *shape, 1.0, a, of_a, b, of_b, float(add), out, of_out)
        return
    addresses = table.T[:3].copy()
    strides, shapes = (part.astype(np.int32, order="C") for part in (table.T[3:6], table.T[6:]))
    a, b, out = zip(_rows(addresses), _rows(strides), strict=True)
    turns = np.array([[flag] * count for flag in flags], np.int32)
    one, of_each, beta = np.ones(count, np.float32), np.ones(count, np.int32), np.full(count, add, np.float32)
    mkl.cblas_sgemm_batch(
        ROW_MAJOR, *_rows(turns), *_rows(shapes), one.ctypes.data, *a, *b, beta.ctypes.data, *out,
        count, of_each.ctypes.data,
    )  # fmt: skip


def _rows(array: np.ndarray) -> list[int]:
    """Addresses of an array's rows."""
    return [row.ctypes.data for row in array]
