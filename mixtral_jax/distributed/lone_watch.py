"""A thread in a process that runs alone, which ends it when a step hangs; each of several has a `Watchdog`."""

import os
import sys
import threading

from mixtral_jax.distributed.supervisor import GIVEN_UP


class LoneWatch:
    """Waits for steps from `start` to `stop`, while this process runs: held still by Ctrl-Z it is not late."""

    def __init__(self, step_timeout: float, restart: str):
        """Starts nothing yet.

        Args:
            step_timeout: seconds without `progress`, once there was some, after which the process ends.
            restart: what to do then.
        """
        self._timeout, self._restart = step_timeout, restart
        self._period = min(5.0, step_timeout / 6)
        self._done: int | None = None  # how often there was progress; None: none is waited for
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()

    def begin(self, step: int) -> None:
        """Takes what a `Watchdog` is told, too; there is nobody else to blame."""

    def progress(self) -> None:
        """Notes that the devices have finished something."""
        self._done = (self._done or 0) + 1

    def stop_waiting(self) -> None:
        """Notes that nothing is to be finished any more."""
        self._done = None

    def _watch(self) -> None:
        seen, waited = self._done, 0.0  # its own: the thread that trains changes nothing here
        while not self._stopped.wait(self._period):
            before, seen = seen, self._done
            waited = 0.0 if seen is None or seen != before else waited + self._period
            if waited > self._timeout:
                sys.stderr.write(
                    f"error: no step was finished in {self._timeout:g} seconds (distributed.step_timeout); see whether "
                    f"the devices and the disk answer, then {self._restart}\n"
                )
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(GIVEN_UP)
