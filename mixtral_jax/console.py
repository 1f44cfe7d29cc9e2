"""A progress bar for people at a terminal and plain lines for everything else."""

import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text


def make_console(**options: Any) -> Console:
    """Makes a console that prints every text as it is: names of users hold brackets, colons and numbers.

    Styles are said by `rich.text.Text` and by columns. Other modules make no consoles; a test holds them to it.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


def make_table(
    left: Iterable[RenderableType], right: Iterable[RenderableType] = (), caption: str = "", **options: Any
) -> Table:
    """Makes a table without rows.

    Args:
        left: headings of the first columns, of names.
        right: headings of the others, of numbers, which are set to the right.
        caption: below the table.
        options: of the columns of numbers, see `Table.add_column`.
    """
    table = Table(caption=caption)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right", **options)
    return table


def two_lines(first: str, second: str) -> Text:
    """Sets a fainter line below a line, for a cell of a table."""
    return Text.assemble(first, "\n", (second, "dim"))


def silent(*_: object) -> None:
    """Shows nothing: stands in for `ProgressLine.add` where nobody looks."""


class ProgressLine(AbstractContextManager["ProgressLine"]):
    """Shows how far a piece of work is.

    Standard output gets a live bar, with a permanent line now and then, if it is a terminal; a file or a pipe gets
    only plain lines without control codes.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        done: int = 0,
        live_line_seconds: float = float("inf"),
        plain_line_seconds: float = 0.0,
    ):
        """Starts the display.

        Args:
            label: what is being done, in a word or two.
            total: steps of the whole work.
            done: steps already done, by an earlier process.
            live_line_seconds: least time between two permanent lines on a terminal; the first and last are always
                printed if it is finite.
            plain_line_seconds: the same elsewhere.
        """
        self._stream = sys.stdout
        self._label, self._total, self._done = label, total, done
        self._begin = self._rate_from = (done, time.monotonic())
        self._last_line: float | None = None
        console = make_console(file=self._stream)
        # Not console.is_terminal: FORCE_COLOR and its like would put control codes into files.
        self._live = self._stream.isatty() and not console.is_dumb_terminal
        self._line_seconds = live_line_seconds if self._live else plain_line_seconds
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),  # gets what the text leaves
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                console=console,
                expand=True,
            )
            shown = label if console.width >= 100 else ""  # 80 columns have no room to say it
            self._task = self._progress.add_task(shown, total=total, completed=done, text="", left="")
            self._progress.start()

    def advance(self, done: int) -> None:
        """Moves the bar to `done` steps without news."""
        self._done = done
        if self._live:
            self._progress.update(self._task, completed=done, left=self._left())

    def update(self, done: int, text: str) -> None:
        """Moves to `done` steps and shows `text` beside them; prints a permanent line when one is due."""
        first_or_last = self._last_line is None or self._done < self._total <= done
        self.advance(done)
        if self._live:
            self._progress.update(self._task, text=text)
        now = time.monotonic()
        if (first_or_last and self._line_seconds < float("inf")) or (
            self._last_line is not None and now - self._last_line >= self._line_seconds
        ):
            self._last_line = now
            elapsed = f"elapsed {clock(now - self._begin[1])}"
            parts = (f"{self._label} {done}/{self._total}", text, elapsed, self._left())
            self.say("  ".join(part for part in parts if part))
        if self._rate_from == self._begin:  # from here on: what comes before holds compilation
            self._rate_from = (done, now)

    def add(self, text: str, count: int = 1) -> None:
        """Moves on by so many steps and shows `text`, as `update` does."""
        self.update(self._done + count, text)

    def say(self, text: str) -> None:
        """Prints a permanent line, above the bar if there is one."""
        if self._live:
            self._progress.console.print(text, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the display; the bar's last state stays."""
        if self._live:
            self._progress.stop()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self) -> str:
        """Estimates the time left from the rate since the first news."""
        done, since = self._rate_from
        if self._done <= done or self._done >= self._total:
            return ""
        return f"left {clock((self._total - self._done) * (time.monotonic() - since) / (self._done - done))}"


def clock(seconds: float) -> str:
    """Writes a duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
