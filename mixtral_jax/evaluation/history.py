"""How a run learnt, from its log."""

from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.runs.metrics_file import read_metrics

LAST = 10  # logged steps whose mean stands for the end of a run
HELD_OUT = "heldout/total"  # nats per token

History = list[dict[str, Any]]  # lines of metrics.jsonl


def read_history(run_dir: Path, step: int | None = None) -> History:
    """Reads the log of a run up to a step; nothing, if there is none."""
    file = run_dir / "metrics.jsonl"
    return [entry for entry in read_metrics(file) if step is None or entry["step"] <= step] if file.exists() else []


def at_end(history: History, name: str) -> float | None:
    """Takes the mean of a metric over training's last logged steps; None where a value is missing or not finite."""
    values = [entry.get(name) for entry in history if "loss" in entry][-LAST:]
    return float(np.mean(values)) if values and None not in values else None  # type: ignore[arg-type]


def held_out(history: History, name: str = "total") -> float | None:
    """Takes the last measurement of held-out text: nats per token of a source or of all."""
    values = [entry[f"heldout/{name}"] for entry in history if entry.get(f"heldout/{name}") is not None]
    return values[-1] if values else None


def median_rate(history: History) -> float | None:
    """Takes the median of the logged tokens per second: start, compilation, evaluation and saves are in none."""
    rates = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    return float(np.median(rates)) if rates else None


def draw_curve(axes: Any, history: History, name: str, step_is: float, **style: Any) -> None:
    """Draws a metric, if the log has it, over what each step is worth (tokens, say); held-out text gets dots."""
    points = [(entry["step"] * step_is, entry[name]) for entry in history if entry.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o-" if name == HELD_OUT else "-", **{"lw": 1, "ms": 4} | style)
    axes.grid(alpha=0.3)
