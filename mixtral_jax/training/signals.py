"""SIGTERM and Ctrl-C ask the loop to save and stop; they never interrupt a step.

Of several processes all stop after the same step, whichever of them was asked: JAX's preemption service takes SIGTERM
and agrees on a step that none has passed yet.
"""

import signal
from types import FrameType

from jax.experimental import multihost_utils

from mixtral_jax.distributed.processes import is_alone


class StopRequest:
    """Listens to signals while it is entered; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._asked = False

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; ask after every step, in every process."""
        return self._asked if is_alone() else multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        if not is_alone():
            signal.raise_signal(signal.SIGTERM)  # which JAX listens to

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGTERM, signal.SIGINT) if is_alone() else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
