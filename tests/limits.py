"""Limits of the system, for a while: what a full disk does to whoever writes, without one."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def limited(what: int, amount: int) -> Iterator[None]:
    """Lowers a limit of this process, such as `resource.RLIMIT_FSIZE`, bytes that a file may have.

    A write beyond that fails as it does on a full disk, after a part of it: errno is EFBIG where there it is ENOSPC.
    """
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (amount, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@contextlib.contextmanager
def mapping_at_most(more: int) -> Iterator[None]:
    """Lets this process map so many more bytes of memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + more):
        yield
