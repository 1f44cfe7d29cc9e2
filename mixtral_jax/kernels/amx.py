"""Products on the matrix units (AMX) of x86 processors, by all threads: see `amx_tiles` for how and how exact."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType

import numpy as np

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = (
    158,
    0x1023,
    18,
)  # Source: Linux, Documentation/arch/x86/xstate.rst
TALLEST, LEAST = 1024, 128  # rows of a block


def load() -> Callable[[np.ndarray, bool, bool, bool], None] | None:
    """Compiles the products and asks Linux for the units.

    Returns:
        What computes a table of products, see `host_products.Multiply`; None where the processor has no such units or
        Numba is not installed.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        from llvmlite import binding

        from mixtral_jax.kernels import amx_tiles
    except ImportError:
        return None
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw")):
        return None
    if ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA):
        return None
    return Units(amx_tiles, len(os.sched_getaffinity(0))).multiply_all


class Units:
    """The matrix units of this machine, which compute one table of products at a time."""

    def __init__(self, tiles: ModuleType, threads: int):
        self._tiles = tiles
        self._workspaces = [_aligned(tiles.WORKSPACE) for _ in range(threads)]
        self._configurations = tiles.make_configurations()
        self._others = ThreadPoolExecutor(threads, "amx")  # beside the calling thread, which computes too
        self._lock = threading.Lock()

    def multiply_all(self, table: np.ndarray, turn_a: bool, turn_b: bool, add: bool) -> None:
        """Computes a table of products, see `host_products.Multiply`; the same bits with any number of threads."""
        threads = len(self._workspaces)
        columns = -(-table[:, 7] // self._tiles.WIDTH)
        height = TALLEST
        while height > LEAST and np.sum(-(-table[:, 6] // height) * columns) < threads:
            height //= 2
        counter = np.zeros(1, np.int64)
        places = counter.ctypes.data, self._configurations.ctypes.data
        work = partial(self._tiles.multiply_blocks, table, turn_a, turn_b, add, height, *places)
        first, *rest = (space.ctypes.data for space in self._workspaces)
        with self._lock:
            others = [self._others.submit(work, space) for space in rest]
            work(first)
            for other in others:
                other.result()


def _aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]
