"""The matrix units (AMX) of x86 processors as an engine of `host_products_calls`; `amx_units` has their arithmetic."""

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

        from mixtral_jax.kernels import amx_tiles, amx_units, native
    except ImportError:
        return False
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw")):
        return False
    if ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA):
        return False
    _memory.append(amx_units.make_configurations())
    native.know(native.CONFIGURATIONS, _memory[0].ctypes.data)
    native.know(native.MULTIPLY, amx_tiles.work)
    native.know(native.AMX, amx_tiles.multiply_all)
    return True
