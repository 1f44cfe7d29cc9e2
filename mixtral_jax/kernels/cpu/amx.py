"""The matrix units (AMX) of x86 processors as an engine of `matmul_calls`; `amx_tiles` has their arithmetic."""

import ctypes
import functools

import numpy as np

# Source: Linux, Documentation/arch/x86/xstate.rst
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
_memory: list[np.ndarray] = []


@functools.cache
def load() -> bool:
    """Asks Linux for the units; False where the processor has no such units or Numba is not installed."""
    try:
        from llvmlite import binding

        from mixtral_jax.kernels.cpu import amx_matmul, amx_tiles, intrinsics
    except ImportError:
        return False
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw")):
        return False
    if ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA):
        return False
    _memory.append(amx_tiles.make_configurations())
    intrinsics.know(intrinsics.CONFIGURATIONS, _memory[0].ctypes.data)
    intrinsics.know(intrinsics.MULTIPLY, amx_matmul.work)
    intrinsics.know(intrinsics.AMX, amx_matmul.multiply_all)
    return True
