"""Makes batches ahead of time in a background thread."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
AHEAD = 2  # batches that wait at most, while another is made


@contextlib.contextmanager
def prefetch(make: Callable[[int], T], start: int, stop: int) -> Iterator[Iterator[T]]:
    """Gives an iterator over `make(step)`, a few made ahead; the thread that makes them ends with the context.

    Args:
        make: builds the batch of a step; an exception in it is raised where the batch is asked for.
        start: first step.
        stop: step after the last.
    """
    steps = iter(range(start, stop))
    pool = ThreadPoolExecutor(1, "prefetch")
    waiting = deque(pool.submit(make, step) for step in islice(steps, AHEAD + 1))

    def in_order() -> Iterator[T]:
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(make, step) for step in islice(steps, 1))
            yield batch

    try:
        yield in_order()
    finally:
        pool.shutdown(cancel_futures=True)
