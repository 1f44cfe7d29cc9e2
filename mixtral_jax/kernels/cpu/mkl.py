"""Products of Intel's oneMKL. Its threads are those of TBB, which do not spin while XLA computes."""

import ctypes
import functools
import importlib.metadata
from ctypes import c_void_p
from typing import Any

LP64, TBB = 0, 3  # MKL_INTERFACE_LP64, MKL_THREADING_TBB


@functools.cache
def load() -> bool:
    """Loads the library as an engine of `matmul_calls`; False where the package `mkl` or `numba` is missing."""
    try:
        _load("tbb", "libtbb.so.")
        mkl = _load("mkl", "libmkl_rt.so")
        from mixtral_jax.kernels.cpu import intrinsics, mkl_batch
    except (ImportError, StopIteration, OSError):
        return False
    mkl.MKL_Set_Interface_Layer(LP64)
    mkl.MKL_Set_Threading_Layer(TBB)
    intrinsics.know(intrinsics.SGEMM_BATCH, ctypes.cast(mkl.cblas_sgemm_batch, c_void_p).value)
    intrinsics.know(intrinsics.MKL, mkl_batch.multiply_all)
    return True


def _load(package: str, name: str) -> Any:
    files = importlib.metadata.files(package) or ()
    path = next(file for file in sorted(files) if file.name.startswith(name))
    return ctypes.CDLL(str(path.locate()), mode=ctypes.RTLD_GLOBAL)
