"""When steps ended on the device, and what the time until the first of them went into."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event, also for a program found on disk


class StepClock(AbstractContextManager["StepClock"]):
    """Times steps where they happen; a context manager.

    The host's own time says little: it runs ahead of the device, and takes in at once the steps that are in flight when
    it saves, evaluates or ends. So a thread waits for one step after the other.
    """

    def __init__(self, every: int):
        """Starts the thread.

        Args:
            every: steps of an interval, `train.log_every`.
        """
        self._every = every
        self._thread = ThreadPoolExecutor(1, "step clock")
        self._mark: float | None = None  # None: no step of this process has ended; the first one compiles
        self._seconds, self._steps = 0.0, 0

    def watch(self, metrics: Any) -> Future[float]:
        """Notes when a step's metrics are there, in the order of calls."""

        def wait() -> float:
            jax.block_until_ready(metrics)
            return time.monotonic()

        return self._thread.submit(wait)

    def interval(self, step: int, ended: float) -> float | None:
        """Takes the next step.

        Args:
            step: its number.
            ended: when it ended.

        Returns:
            At the end of an interval whose steps all followed another one in this process, their seconds; else None.
        """
        if self._mark is not None:
            self._seconds += ended - self._mark
            self._steps += 1
        self._mark = ended
        if step % self._every:
            return None
        seconds = self._seconds if self._steps == self._every else None
        self._seconds, self._steps = 0.0, 0
        return seconds

    def resume(self) -> None:
        """Leaves out the time since the last step ended: it was not training's."""
        self._mark = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


class StartClock:
    """What a start spends, part by part, until its first step has ended."""

    def __init__(self, began: float | None):
        """Starts the clock.

        Args:
            began: when the process did, by `time.monotonic`; None: not to be told.
        """
        self._last = time.monotonic()
        self.parts = {} if began is None else {"imports": self._last - began}
        self._compiled = 0.0

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            self._compiled = time.monotonic()

    def end(self, part: str, at: float | None = None) -> None:
        """Says that a part, or more of one, has ended now, or at a time."""
        at = time.monotonic() if at is None else at
        self.parts[part] = self.parts.get(part, 0.0) + at - self._last
        self._last = at

    @property
    def seconds(self) -> float:
        """What all parts so far took."""
        return sum(self.parts.values())

    def begin_steps(self) -> None:
        """Says that the first step comes next, with what it compiles."""
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def first_step(self, ended: float) -> str:
        """Tells of all parts in one line, once the first step has ended."""
        self.end("compile", min(max(self._compiled, self._last), ended))
        self.end("first step", ended)
        jax.monitoring.unregister_event_duration_listener(self._note)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"start took {self.seconds:.1f} s: {parts}"
