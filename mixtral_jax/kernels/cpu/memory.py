"""What the C library does with memory while XLA computes on a CPU; needs nothing but Linux."""

import ctypes
import functools
import glob
import os
import sys

TUNABLES = "GLIBC_TUNABLES"
# Where Linux shows GPUs of NVIDIA (also under WSL and on Jetson boards) and AMD, and TPUs.
ACCELERATORS = (
    "/dev/nvidia*",
    "/dev/dxg",
    "/dev/nvhost*",
    "/dev/nvgpu*",
    "/dev/kfd",
    "/dev/accel*",
    "/dev/vfio/[0-9]*",
)
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event, also for a program found on disk
LONG = 0.1  # seconds of a compilation that leaves something behind


def restart_with_huge_pages() -> None:
    """Starts a program that will compute on a CPU again, with huge pages for large memory where Linux gives them.

    XLA for CPU takes its temporaries anew for every step; page by page of 4 KiB that is a tenth of its time. The C
    library reads the wish at start alone. Not for one of several processes: who started it watches it.
    """
    if sys.platform != "linux" or TUNABLES in os.environ or _computes_elsewhere():
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _computes_elsewhere() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms.split(",")[0] != "cpu" if platforms else any(glob.glob(path) for path in ACCELERATORS)


@functools.cache
def return_memory() -> None:
    """Lets the C library give back to Linux what compilers have freed, and it would keep: 0.3 GiB of a peak."""
    import jax

    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's

    def after(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs > LONG and trim_heap:
            trim_heap(0)

    jax.monitoring.register_event_duration_secs_listener(after)
