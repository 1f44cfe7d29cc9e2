"""How many bytes of a checkpoint have passed, and how fast."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mixtral_jax.console import ProgressLine

_MIB = 1 << 20


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows progress over `total` bytes; yields the function that adds some."""
    begin, done = time.monotonic(), 0
    whole = -(-total // _MIB)
    with ProgressLine(label, whole, plain_line_seconds=10.0) as line:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = done / max(time.monotonic() - begin, 1e-3) / 1e6
            line.update(whole if done >= total else done // _MIB, f"MiB, {rate:.0f} MB/s")

        yield advance
