"""The matrix units (AMX) of x86 processors, by all threads for one caller at a time: see `amx_units` for the rest."""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

# Source: Linux, Documentation/arch/x86/xstate.rst
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
TALLEST, LEAST = 1024, 128  # rows of a block of a product


class Units:
    """The matrix units of this machine."""

    def __init__(self, threads: int, workspace: int, configurations: np.ndarray):
        self.threads = threads
        self._workspaces = [_aligned(workspace) for _ in range(threads)]
        self._configurations = configurations
        self._others = ThreadPoolExecutor(threads, "amx")  # beside the calling thread, which computes too
        self._lock = threading.Lock()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a compiled function by all threads, with addresses of configurations and of a workspace at the end."""
        configurations = self._configurations.ctypes.data
        first, *rest = (space.ctypes.data for space in self._workspaces)
        with self._lock:
            others = [self._others.submit(function, *arguments, configurations, space) for space in rest]
            function(*arguments, configurations, first)
            for other in others:
                other.result()


@functools.cache
def units() -> Units | None:
    """Asks Linux for the units; None where the processor has no such units or Numba is not installed."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        from llvmlite import binding

        from mixtral_jax.kernels import amx_attend, amx_tiles, amx_units
    except ImportError:
        return None
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw")):
        return None
    if ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA):
        return None
    workspace = max(amx_tiles.WORKSPACE, amx_attend.WORKSPACE)
    return Units(len(os.sched_getaffinity(0)), workspace, amx_units.make_configurations())


def load() -> Callable[[np.ndarray, bool, bool, bool], None] | None:
    """Finds what computes a table of products, see `host_products.Multiply`; the bits do not depend on the threads."""
    found = units()
    return None if found is None else functools.partial(_multiply_all, found)


def _multiply_all(units: Units, table: np.ndarray, turn_a: bool, turn_b: bool, add: bool) -> None:
    from mixtral_jax.kernels.amx_tiles import WIDTH, multiply_blocks

    columns = -(-table[:, 7] // WIDTH)
    height = TALLEST
    while height > LEAST and np.sum(-(-table[:, 6] // height) * columns) < units.threads:
        height //= 2
    counter = np.zeros(1, np.int64)
    units.run(multiply_blocks, table, turn_a, turn_b, add, height, counter.ctypes.data)


def _aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]
