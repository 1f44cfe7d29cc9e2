"""Makes batches ahead of time in a background thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `make(step)` for the steps from `start` to below `stop`, a few made ahead.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2):
        """Starts the thread.

        Args:
            make: builds the batch of a step; an exception in it is raised where the batch is asked for.
            start: first step.
            stop: step after the last.
            depth: batches that wait at most.
        """
        self._queue: queue.Queue[T | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, start, stop), daemon=True, name="prefetch")
        self._thread.start()

    def _work(self, make: Callable[[int], T], start: int, stop: int) -> None:
        try:
            for step in range(start, stop):
                if not self._put(make(step)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException | None) -> bool:
        """Waits for room; False when the consumer has gone."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        """Yields the batches in the order of their steps."""
        while not self._closed.is_set():
            item = self._queue.get()
            if item is not None and not isinstance(item, BaseException):
                yield item
                continue
            self.close()
            if item is not None:
                raise item

    def close(self) -> None:
        """Ends the thread and drops what it has made."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
