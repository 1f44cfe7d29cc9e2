"""Goodput: the share of a run's wall time, over all of its starts, that went into steps which count."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from mixtral_jax.config import UserError
from mixtral_jax.distributed.processes import is_main
from mixtral_jax.whole_files import write_whole

FILE = "goodput.json"
PERIOD = 10.0  # seconds between two writes; what a kill leaves unwritten is `down`
MARKS = 100  # checkpoints of which is known how much of the steps lay before them
PARTS = (
    "steps",  # that count
    "start",  # from the process's beginning to the first step, without its compilation; going back to a checkpoint
    "compile",  # of the first step
    "data",  # the loop waited for a batch
    "evaluation",  # of held-out text
    "saves",  # the loop waited for a checkpoint
    "lost",  # steps after the checkpoint from which the next start went on, or to which the run went back
    "down",  # between a start's last words and the next start
)

Item = TypeVar("Item")


class Goodput:
    """The account of one run; what a loop does is `steps` unless it says otherwise."""

    def __init__(self, run_dir: Path, step: int, start: float):
        """Goes on from the account of earlier starts, if there is one.

        Args:
            run_dir: holds the account; of several processes the main one writes it.
            step: of the checkpoint from which the run goes on; 0: it begins.
            start: seconds that this process took so far.
        """
        self._file = run_dir / FILE
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks, self._starts = {0: 0.0}, 1
        if (earlier := _read(self._file)) is not None:
            self._starts += earlier["starts"]
            self._seconds |= earlier["seconds"]
            self._marks = {int(mark): seconds for mark, seconds in earlier["marks"].items()}
            self._lose(step)
            self._seconds["down"] += max(0.0, time.time() - start - earlier["written"])  # clocks jump
        self._seconds["start"] += start
        self._part, self._since = "steps", time.monotonic()
        self._write()

    def _lose(self, step: int) -> None:
        """Counts the steps after a checkpoint as lost."""
        self._marks = {0: 0.0} | {mark: seconds for mark, seconds in self._marks.items() if mark <= step}
        counts = self._marks[max(self._marks)]
        self._seconds["lost"] += self._seconds["steps"] - counts
        self._seconds["steps"] = counts

    def go_back(self, step: int) -> None:
        """Notes that the run goes on from an earlier checkpoint, in this process; 0: from its beginning."""
        self._switch(self._part)
        self._lose(step)
        self._write()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside as another part than the steps."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and counts the time that each was waited for as `data`."""
        iterator = iter(items)
        while True:
            with self.part("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def compiled(self, seconds: float) -> None:
        """Says how much of the first step was its compilation."""
        self._seconds["steps"] -= seconds
        self._seconds["compile"] += seconds

    def keep(self, step: int) -> None:
        """Notes that a checkpoint of this step is there to go on from."""
        self._switch(self._part)
        self._marks[step] = self._seconds["steps"]
        self._marks = dict(sorted(self._marks.items())[-MARKS:])
        self._write()

    def share(self) -> float:
        """Share of the steps that count in the wall time until now."""
        self._switch(self._part)
        if time.monotonic() - self._written > PERIOD:
            self._write()
        return self._seconds["steps"] / sum(self._seconds.values())

    def text(self) -> str:
        """The account in one line, for people."""
        share = self.share()
        spent = {name: timedelta(seconds=round(seconds)) for name, seconds in self._seconds.items()}
        parts = ", ".join(f"{name} {seconds}" for name, seconds in spent.items() if seconds)
        whole = timedelta(seconds=round(sum(self._seconds.values())))
        return f"goodput {share:.1%} of {whole} in {self._starts} start{'s' * (self._starts > 1)}: {parts}"

    def _switch(self, part: str) -> str:
        """Counts the time until now; returns the part that it was counted as."""
        now, before = time.monotonic(), self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def _write(self) -> None:
        self._written = time.monotonic()
        if is_main():
            account = {"starts": self._starts, "seconds": self._seconds, "marks": self._marks, "written": time.time()}
            try:
                write_whole(self._file, json.dumps(account).encode())
            except OSError as error:
                raise UserError(
                    f"cannot write {self._file}: {error.strerror}; fix that and start the same command again, it goes "
                    "on from the newest checkpoint"
                ) from None


def _read(file: Path) -> dict[str, Any] | None:
    """The account of earlier starts; None where there is none, or what is there is no account."""
    try:
        account = json.loads(file.read_bytes())
        complete = {*account} == {"starts", "seconds", "marks", "written"} and {*account["seconds"]} == {*PARTS}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return account if complete else None
