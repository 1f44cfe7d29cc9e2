"""A thread in every process of a run that sees to it that all end when one fails, vanishes or hangs.

Processes meet in the key-value store of JAX's coordination service, which process 0 holds. Each sends a sign of life
there, process 0 looks for those that stopped, and the first process that finds a reason to end writes it down as the
verdict; all read it, say it and leave. Left alone, a run would wait for ever: a collective has no deadline.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mixtral_jax.distributed.step_watch import StepWatch
from mixtral_jax.distributed.supervisor import ANEW, GIVEN_UP

ROOT = "mixtral_jax/"
USER_ERROR = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Why all processes end."""

    code: int  # exit code
    text: str  # a sentence for people
    by: int  # the process that found it
    lost: int = 0  # processes that will not answer any more


class Watchdog(StepWatch):
    """Watches one process and, in process 0, all; a thread from `start` to `stop`."""

    def __init__(
        self,
        client: Any,
        process: int,
        count: int,
        *,
        heartbeat_timeout: float,
        step_timeout: float,
        restart: str = ANEW,
    ):
        """Starts nothing yet.

        Args:
            client: of JAX's coordination service.
            process: number of this process.
            count: of all processes.
            heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
            step_timeout: seconds without `progress`, once there was some, after which the run counts as hung.
            restart: what to do then.
        """
        super().__init__(step_timeout, restart)
        self.client, self.process, self.count = client, process, count
        self._heartbeat_timeout, self._period = heartbeat_timeout, min(5.0, heartbeat_timeout / 6)
        self._looks = 0
        self._signs: dict[int, tuple[str, float]] = {}  # the last of each process, and when it was first seen
        self._leaving = threading.Lock()
        self.farewells: list[Callable[[], None]] = []  # what is done before this process ends for a verdict

    def start(self) -> None:
        """Begins to watch; whoever is lost from now on is known to have been there."""
        with contextlib.suppress(Exception):  # the thread tries again
            self._give_sign()
        super().start()

    def _give_sign(self) -> None:
        sign = f"{self._looks} {self._begun} {socket.gethostname()}"
        self.client.key_value_set(f"{ROOT}alive/{self.process}", sign, allow_overwrite=True)

    def end_all(self, code: int, text: str) -> None:
        """Ends all processes for a reason that this one has; does not return.

        Args:
            code: exit code; 2 is said by process 0 alone, for the others have made the same mistake.
            text: the reason, a sentence.
        """
        if self.process and code == USER_ERROR:
            self._await_verdict(3 * self._period + 1)  # process 0 is about to say the same
        self._leave(self._announce(Verdict(code, text, self.process)))

    def await_verdict(self) -> None:
        """Gives the others, after an error of communication, the time to find out who is lost; may not return."""
        self._await_verdict(self._heartbeat_timeout + 3 * self._period + 1)

    def _await_verdict(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self._period / 4)  # the thread leaves with the verdict

    def _look(self, *, late: bool) -> None:
        self._looks += 1
        try:
            self._give_sign()
            verdict = self._read_verdict()
            if verdict is None and self.process == 0:
                verdict = self._find_lost()
            if verdict is None and late:
                verdict = self._find_hang()
        except Exception as error:  # JAX ends the process itself where the coordinator is gone
            log.debug("the coordinator does not answer: %s", error)
            return
        if verdict is not None:
            self._leave(verdict)

    def _find_lost(self) -> Verdict | None:
        """Compares the signs of life with the last ones seen."""
        now, signs = time.monotonic(), self._signs
        for process, sign in self._read_signs().items():
            if process not in signs or signs[process][0] != sign:
                signs[process] = sign, now
        lost = [process for process, (_, seen) in signs.items() if now - seen > self._heartbeat_timeout]
        if not lost:
            return None
        who = _names({process: signs[process][0] for process in lost})
        text = (
            f"{who} gave no sign of life for {self._heartbeat_timeout:g} seconds: killed, out of memory, frozen or cut "
            f"off; look at its log, then {self.restart}"
        )
        return self._announce(Verdict(GIVEN_UP, text, self.process, lost=len(lost)))

    def _find_hang(self) -> Verdict:
        signs = self._read_signs()
        begun = {process: int(sign.split()[1]) for process, sign in signs.items()}
        behind = {process: signs[process] for process, step in begun.items() if step == min(begun.values())}
        text = self._late
        if len(behind) < len(begun):
            step = max(1, min(begun.values()))
            text += f"; {_names(behind)} hangs in or before step {step}, the others wait for it"
        return self._announce(Verdict(GIVEN_UP, f"{text}; {self.restart}", self.process))

    def _read_signs(self) -> dict[int, str]:
        entries = self.client.key_value_dir_get(f"{ROOT}alive/")
        return {int(key.rpartition("/")[2]): sign for key, sign in entries}

    def _read_verdict(self) -> Verdict | None:
        entries = self.client.key_value_dir_get(f"{ROOT}verdict/")
        return Verdict(**json.loads(entries[0][1])) if entries else None

    def _announce(self, verdict: Verdict) -> Verdict:
        """Writes a verdict down, unless there is one; returns the one that holds."""
        with contextlib.suppress(Exception):  # there is one, or no coordinator any more
            self.client.key_value_set(f"{ROOT}verdict/first", json.dumps(asdict(verdict)))
        with contextlib.suppress(Exception):
            return self._read_verdict() or verdict
        return verdict

    def _leave(self, verdict: Verdict) -> None:
        """Says the verdict and ends the process; the interpreter's own farewells would wait for the others."""
        self._leaving.acquire()  # for ever: only one thread says it
        if self.process == 0 or verdict.code != USER_ERROR:
            text = (
                verdict.text
                if verdict.by == 0 or verdict.code != USER_ERROR
                else f"{verdict.text} ({self._by(verdict)})"
            )
            sys.stderr.write(f"error: {text}\n")  # in one piece: print writes the end of the line apart
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{ROOT}gone/{self.process}", "")
            if self.process == 0:  # with it goes the coordinator, and who has not read the verdict by then is aborted
                deadline = time.monotonic() + 3 * self._period + 2
                left = self.count - verdict.lost
                while time.monotonic() < deadline and len(self.client.key_value_dir_get(f"{ROOT}gone/")) < left:
                    time.sleep(0.05)
        for farewell in self.farewells:
            with contextlib.suppress(Exception):
                farewell()
        os._exit(verdict.code)

    def _by(self, verdict: Verdict) -> str:
        with contextlib.suppress(Exception):
            return _names({verdict.by: self._read_signs()[verdict.by]})
        return f"process {verdict.by}"


def _names(signs: dict[int, str]) -> str:
    """Processes by number and host, from their signs of life."""
    return " and ".join(f"process {process} on {sign.split()[2]}" for process, sign in sorted(signs.items()))
