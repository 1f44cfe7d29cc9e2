"""One thread runs the model for all who wait: first come, first served, and nobody's reader holds up another's text."""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.inference.batching import RunningBatch, Token
from mixtral_jax.inference.decoding import Drawn
from mixtral_jax.inference.text import Continuation, Prompt


class BusyError(Exception):
    """As many wait as may."""


class StoppedError(Exception):
    """The engine takes no work any more."""


@dataclass(frozen=True)
class Progress:
    """What is new of a text. An answer has at most one of them a token, so what a slow reader leaves is bounded."""

    text: str
    tokens: list[Token]
    finish_reason: Literal["stop", "length", "error"] | None


@dataclass(eq=False)
class Job:
    """A text that somebody waits for."""

    continuation: Continuation
    alternatives: int
    deliver: Callable[[Progress], None]  # called by the engine's thread; must not wait
    submitted: float = field(default_factory=time.monotonic)
    first_token: float = 0.0  # when it came; 0: not yet
    latest: float = 0.0  # when the latest came
    cancelled: bool = False

    def take(self, tokens: list[Token]) -> Progress:
        """Adds drawn tokens to the text."""
        self.latest = time.monotonic()
        self.first_token = self.first_token or self.latest
        before = len(self.continuation.tokens)
        text = self.continuation.extend(Drawn([t.token for t in tokens], [t.log_prob for t in tokens]))
        taken = len(self.continuation.tokens) - before
        return Progress(text, tokens[:taken], self.continuation.finish_reason)


class Engine:
    """The running batch, its thread, and who waits for a row."""

    def __init__(self, batch: RunningBatch, tokenizer: Tokenizer, *, queue: int):
        """Takes the batch over.

        Args:
            batch: no other may use it from here on.
            tokenizer: of the model.
            queue: texts that may wait for a row.
        """
        self.batch, self.tokenizer, self.queue = batch, tokenizer, queue
        self.prompt_tokens = self.drawn_tokens = 0  # so far
        self.failed: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.ended: Callable[[Job], None] = lambda job: None  # hears of every text that came to its end
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends what runs, with an error for those who wait, and the thread with it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, prompts: list[Prompt], alternatives: int, deliver: Callable[[int, Progress], None]) -> list[Job]:
        """Lets all of these texts wait for a row, or none of them.

        Args:
            prompts: what to continue; each fits the context.
            alternatives: likeliest tokens wanted with each drawn one.
            deliver: gets the number of the prompt and what is new, in the engine's thread.

        Raises:
            BusyError: so many wait already.
            StoppedError: the engine does not run.
        """
        jobs = [
            Job(Continuation(prompt, self.tokenizer), alternatives, partial(deliver, number))
            for number, prompt in enumerate(prompts)
        ]
        with self._changed:
            if self._stopping:
                raise StoppedError
            if len(self._waiting) + len(jobs) > self.queue + max(0, self.batch.rows - len(self._running)):
                raise BusyError
            self._waiting += jobs
            self._changed.notify()
        return jobs

    def cancel(self, job: Job) -> None:
        """Frees what a text has, if it has not ended."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    @property
    def running(self) -> int:
        """Texts that have a row."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts that wait for one."""
        return len(self._waiting)

    def _run(self) -> None:
        try:
            while self._admit():
                self._advance()
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            traceback.print_exc(file=sys.stderr)
            self.failed = error
            self.on_failure()
        with self._changed:
            self._stopping = True
            left = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for job in left:
            job.deliver(Progress("", [], "error"))

    def _advance(self) -> None:
        for row, tokens in self.batch.step().items():
            job = self._running[row]
            progress = job.take(tokens)
            self.drawn_tokens += len(progress.tokens)
            if progress.finish_reason:
                self._leave(row)
                self.ended(job)
            job.deliver(progress)

    def _admit(self) -> bool:
        """Frees the rows of those who left and fills them; waits for work, and returns whether to go on."""
        with self._changed:
            for row in [row for row, job in self._running.items() if job.cancelled]:
                self._leave(row)
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._running)
            while self._waiting and self.batch.free:
                job = self._waiting.popleft()
                prompt = job.continuation.prompt
                self._running[self.batch.join(prompt.tokens, prompt.sampling, job.alternatives)] = job
                self.prompt_tokens += len(prompt.tokens)
            return not self._stopping

    def _leave(self, row: int) -> None:
        self.batch.leave(row)
        del self._running[row]
