"""What every benchmark shares: interleaved timing, medians, one table and one JSON object."""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from mixtral_jax.console import make_console

LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers")


def interleaved(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times every piece of work once a round, so that a busy machine slows all of them alike.

    Args:
        work: functions by name; each has done its work when it returns, arrays of JAX excepted, which are waited for.
        rounds: how often; one round before them compiles and is not counted.

    Returns:
        Seconds of every round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round: steadier than the ratio of two medians."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def machine() -> str:
    """Names the processor or accelerator, the cores and the versions, without which a timing says little."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        name = f"{model or platform.machine()}, {os.cpu_count()} cores"
    installed = [f"{name} {version}" for name in LIBRARIES if (version := _version(name))]
    return f"{name}; Python {platform.python_version()}, {', '.join(installed)}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass
class Report:
    """Rows of named figures; printed as a table, and as one JSON object on the last line."""

    title: str
    formula: str  # what the figures mean
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **figures: Any) -> None:
        """Adds a row; every row has the same names."""
        self.rows.append(figures)

    def show(self) -> None:
        """Prints the table for people and the JSON for scripts."""
        console = make_console(width=None if os.isatty(1) else 140)
        table = Table(title=f"{self.title}\n{machine()}", caption=self.formula, caption_justify="left")
        for name in self.rows[0]:
            table.add_column(name.replace("_", " "), justify="left" if isinstance(self.rows[0][name], str) else "right")
        for row in self.rows:
            table.add_row(*(for_people(value) for value in row.values()))
        console.print(table)
        print(json.dumps({"benchmark": self.title, "machine": machine(), "formula": self.formula, "rows": self.rows}))


def for_people(value: Any) -> str:
    """A figure as it is printed."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
