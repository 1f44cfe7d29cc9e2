"""One call a logged step: to `metrics.jsonl`, to TensorBoard and to the person who watches."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import SupportsFloat

from mixtral_jax.console import ProgressLine
from mixtral_jax.runs.metrics_file import MetricsFile, Vectors
from mixtral_jax.runs.tensorboard import TensorBoard


class MetricsLogger(AbstractContextManager["MetricsLogger"]):
    """Writes the metrics of a run; a context manager.

    Only the main process of a run writes; the loggers of others take the same calls and do nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        resume_step: int = 0,
        descriptions: Mapping[str, str] | None = None,
        is_main: bool = True,
    ):
        """Opens the files and shows the progress bar.

        Args:
            run_dir: gets `metrics.jsonl` and `tensorboard/`.
            total_steps: optimizer steps of the whole run.
            resume_step: step of the checkpoint from which the run goes on; what an earlier process logged after it is
                dropped, so no step appears twice. 0: the run starts anew.
            descriptions: metric name -> what TensorBoard's legend adds about it, such as the peak behind `mfu`.
            is_main: whether this process writes.

        Raises:
            UserError: the run directory cannot be written, or its `metrics.jsonl` is damaged.
        """
        self._active = is_main
        if not is_main:
            return
        self._file = MetricsFile(run_dir / "metrics.jsonl", resume_step)
        self._tensorboard = TensorBoard(run_dir / "tensorboard", resume_step, descriptions or {})
        self._progress = ProgressLine("train", total_steps, done=resume_step, live_line_seconds=30.0)

    def log(
        self,
        step: int,
        scalars: Mapping[str, SupportsFloat],
        vectors: Vectors | None = None,
    ) -> None:
        """Logs one step.

        Args:
            step: optimizer steps done.
            scalars: values by name; those of `tensorboard.CHARTS` and any name with a slash have a group of their own.
                With a `loss` among them they are shown at the progress bar; without one (an evaluation) they are only
                written.
            vectors: arrays [layers, experts] by name: `expert_load`, shares of a layer's assignments.

        Raises:
            UserError: the disk is full or the like.
        """
        if not self._active:
            return
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in scalars.items()}
        self._file.write(step, numbers, vectors or {})
        self._tensorboard.write(step, numbers, vectors or {})
        if "loss" in numbers:
            self._progress.update(step, _for_people(numbers))

    def advance(self, step: int) -> None:
        """Moves the progress bar; for steps that are not logged."""
        if self._active:
            self._progress.advance(step)

    def say(self, text: str) -> None:
        """Prints a line for the person who watches, above the progress bar."""
        if self._active:
            self._progress.say(text)

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._active:
            self._progress.close()
            self._tensorboard.close()
            self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _for_people(scalars: Mapping[str, int | float]) -> str:
    """Chooses and formats what fits beside a bar; what a step did not log is left out."""
    parts = [f"loss {scalars['loss']:.4f}"]
    if "tokens_per_second" in scalars:
        rate = scalars["tokens_per_second"]
        parts.append(f"{rate:,.0f} tok/s" if rate < 1e5 else f"{rate / 1e6:.2f}M tok/s")
    if "mfu" in scalars:
        parts.append(
            f"MFU {scalars['mfu']:.1%}" + (" (more than there is: see the warning)" if scalars["mfu"] > 1 else "")
        )
    if scalars.get("skipped_updates"):
        parts.append(f"{scalars['skipped_updates']:.0f} updates skipped")
    return "  ".join(parts)
