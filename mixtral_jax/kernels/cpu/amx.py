"""The matrix units (AMX) of x86 processors as an engine of `matmul`; `amx_tiles` has their arithmetic."""

import ctypes
import functools

import numpy as np
from llvmlite import binding

from mixtral_jax.kernels.cpu import amx_matmul, amx_tiles
from mixtral_jax.kernels.cpu.intrinsics import AMX, CONFIGURATIONS, MULTIPLY, set_state

# Source: Linux, Documentation/arch/x86/xstate.rst
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
_memory: list[np.ndarray] = []


@functools.cache
def load() -> bool:
    """Asks Linux for the units; False where the processor has none."""
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw")):
        return False
    if ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA):
        return False
    _memory.append(amx_tiles.make_configurations())
    set_state(CONFIGURATIONS, _memory[0].ctypes.data)
    set_state(MULTIPLY, amx_matmul.work)
    set_state(AMX, amx_matmul.multiply_all)
    return True
