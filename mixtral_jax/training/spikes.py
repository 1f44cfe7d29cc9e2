"""Spikes of the loss, for which a run goes back to a checkpoint and leaves the batches from there to the spike out."""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

from mixtral_jax.config import UserError

KEPT = "rollbacks"  # in the meta file of a checkpoint
WINDOW = 128  # losses of finished steps that the next one is held against
FEWEST = 32  # of them, before which nothing counts as a spike
SPREADS = 10  # median absolute deviations; of normal noise, 1.5 of them are a standard deviation
LEAST = 0.1  # of the median, for where losses hardly differ


class Spike(NamedTuple):
    """A loss that stands out."""

    step: int
    loss: float
    bound: float  # what it is above


class Rollbacks:
    """Holds the loss of every step against those before it, and counts how often the run went back."""

    def __init__(self, meta: dict[str, Any] | None, count: int | None = None):
        """Goes on as a checkpoint says.

        Args:
            meta: of the checkpoint from which the run goes on; one of an earlier version knows of no spikes.
            count: how often the run went back, where it has just done so; None: as often as the checkpoint says.
        """
        kept = (meta or {}).get(KEPT, {"count": 0, "losses": [], "skipped": []})
        self.count: int = kept["count"] if count is None else count
        self.skipped: list[tuple[int, int]] = [(begin, end) for begin, end in kept["skipped"]]
        self._losses = deque[float](kept["losses"], WINDOW)
        self.spike: Spike | None = None  # for which the run is to go back now

    def describe(self, skipped: list[tuple[int, int]]) -> dict[str, Any]:
        """What a checkpoint is to remember, with the batches that were left out."""
        return {"count": self.count, "losses": [*self._losses], "skipped": skipped}

    def look(self, step: int, loss: float, most: int) -> None:
        """Takes the next step; a loss above median + max(10 MAD, median / 10) is a spike, and is not kept.

        A loss that is not finite is none: its update was left out.

        Args:
            step: its number.
            loss: of that step.
            most: times that the run may go back, `train.max_rollbacks`.

        Raises:
            UserError: it has gone back so often.
        """
        if not math.isfinite(loss):
            return
        if len(self._losses) >= FEWEST:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(before - median) for before in self._losses)
            bound = median + max(SPREADS * spread, LEAST * abs(median))
            if loss > bound:
                self.spike = Spike(step, loss, bound)
                if self.count >= most:
                    raise UserError(
                        f"the loss of step {step} is {loss:.4g}, a spike above {bound:.4g}, and the run went back "
                        f"{self.count} times already (train.max_rollbacks): look at the data or lower "
                        "optimizer.learning_rate in a new run, or raise train.max_rollbacks and start it again"
                    )
                return
        self._losses.append(loss)
