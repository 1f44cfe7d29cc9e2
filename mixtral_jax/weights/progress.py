"""How many bytes of a checkpoint have passed, and how fast."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Shaped

from mixtral_jax.console import ProgressLine
from mixtral_jax.distributed.processes import count as processes

_MB = 10**6


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows progress over `total` bytes; yields the function, for any thread, that adds what this process did of them.

    The others are taken to be as far as this one.
    """
    begin, done = time.monotonic(), 0
    whole = -(-total // _MB)
    adding = threading.Lock()
    with ProgressLine(f"{label}, MB", whole, plain_line_seconds=10.0) as line:

        def advance(count: int) -> None:
            nonlocal done
            with adding:
                done = min(total, done + count * processes())
                rate = done / max(time.monotonic() - begin, 1e-3) / 1e6
                line.update(whole if done == total else done // _MB, f"{rate:.0f} MB/s")

        yield advance
        if done < total:
            advance(total - done)


def counted(pieces: Iterable[Shaped[np.ndarray, "..."]], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Yields pieces of a tensor, and tells of the bytes of each once it was taken."""
    for piece in pieces:
        yield piece
        advance(piece.nbytes)
