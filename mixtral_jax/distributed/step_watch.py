"""A thread in a process that runs alone, which ends it when a step hangs; each of several has a `Watchdog`."""

import os
import sys
import threading

from mixtral_jax.distributed.supervisor import GIVEN_UP


class StepWatch:
    """Waits for steps from `start` to `stop`, while this process runs: held still by Ctrl-Z it is not late."""

    def __init__(self, step_timeout: float, restart: str):
        """Starts nothing yet.

        Args:
            step_timeout: seconds without `progress`, once there was some, after which the process ends.
            restart: what to do then.
        """
        self._step_timeout, self.restart = step_timeout, restart
        self._period = min(5.0, step_timeout / 6)
        self._late = f"no step was finished in {step_timeout:g} seconds (distributed.step_timeout)"
        self._begun = 0  # steps that this process has started
        self._done: int | None = None  # how often there was progress; None: none is waited for
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; call it when every process is done."""
        self._stopped.set()
        self._thread.join()

    def begin(self, step: int) -> None:
        """Notes that this process goes to work on a step: where processes hang, the last to come is to blame."""
        self._begun = step

    def progress(self) -> None:
        """Notes that the devices have finished something."""
        self._done = (self._done or 0) + 1

    def stop_waiting(self) -> None:
        """Notes that nothing is to be finished any more; what comes after training takes what it takes."""
        self._done = None

    def _watch(self) -> None:
        seen, waited = self._done, 0.0  # its own: the thread that trains changes nothing here
        while not self._stopped.wait(self._period):
            before, seen = seen, self._done
            waited = 0.0 if seen is None or seen != before else waited + self._period
            self._look(late=waited > self._step_timeout)

    def _look(self, *, late: bool) -> None:
        if late:
            sys.stderr.write(f"error: {self._late}; see whether the devices and the disk answer, then {self.restart}\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(GIVEN_UP)
