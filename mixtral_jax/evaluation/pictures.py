"""Pictures of what was measured, as PNG; matplotlib is imported only where one is drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.evaluation.context import ContextCurve
from mixtral_jax.evaluation.passkey import PasskeyGrid
from mixtral_jax.evaluation.perplexity import Evaluation

DPI = 120


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, np.ndarray]:
    """Makes a figure of width x height inches and its panels [rows, columns]."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # no pyplot: nothing here may depend on a display

    rcParams["text.parse_math"] = False  # a name of the user's may hold dollar signs
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG."""
    figure.savefig(path, dpi=DPI)


def draw_perplexity(evaluation: Evaluation, path: Path) -> None:
    """Draws the bits per byte of each source with their intervals: they compare across sources and tokenizers."""
    named = {**evaluation.sources, "total": evaluation.total}
    figure, panels = new_figure(7.0, 1 + 0.35 * len(named))
    axes = panels[0, 0]
    for row, result in enumerate(named.values()):
        bounds = result.intervals()
        axes.plot(result.bits_per_byte, row, "o", color="C0")
        if bounds is not None:
            axes.plot(bounds.bits_per_byte, [row, row], color="C0")
    axes.set_yticks(range(len(named)), list(named))
    axes.set(xlabel="bits per byte, 95% interval over documents")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    save(figure, path)


def draw_context(curves: Mapping[str, ContextCurve], path: Path) -> None:
    """Draws the loss over the context's length, with its interval, and over the position in the window."""
    figure, panels = new_figure(10.0, 4.2, 1, 2)
    left, right = panels[0]
    for number, (name, curve) in enumerate(curves.items()):
        colour = f"C{number}"
        left.plot(curve.contexts, curve.nats_per_token(), "o-", color=colour, label=name)
        bounds = curve.intervals()
        if bounds[0] is not None:
            low, high = np.array(bounds).T
            left.fill_between(curve.contexts, low, high, color=colour, alpha=0.15, lw=0)
        bins = curve.by_position()
        right.plot(
            [(first + last) / 2 for first, last, _ in bins], [nats for *_, nats in bins], color=colour, label=name
        )
    first = next(iter(curves.values()))
    left.set(
        xlabel="context, tokens",
        ylabel="nats per token",
        title=f"the same last {first.targets} targets of windows of {first.contexts[-1]:,}",
    )
    right.set(xlabel="tokens seen before the target", title="all targets of these windows, by position")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,g}")  # its own is written for the parser that `new_figure` switches off
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    save(figure, path)


def draw_passkey(grid: PasskeyGrid, path: Path) -> None:
    """Draws two heat maps over length and depth: the share of keys found, and the loss of the key."""
    figure, panels = new_figure(12.0, 1.6 + 0.5 * len(grid.plan.lengths), 1, 2)
    for axes, values, title, scale, form in (
        (panels[0, 0], grid.accuracy, "share of keys that greedy decoding writes", ("RdYlGn", 1.0), "{:.0%}"),
        # Not to the darkest colour, on which the numbers could not be read.
        (panels[0, 1], grid.nats_per_token, "nats per token of the key", ("YlOrRd", 1.4 * grid.nats_per_token.max()),
         "{:.2f}"),
    ):  # fmt: skip
        image = axes.imshow(values, aspect="auto", cmap=scale[0], vmin=0, vmax=scale[1], origin="lower")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(grid.plan.depths)), [f"{depth:.0%}" for depth in grid.plan.depths])
        axes.set_yticks(range(len(grid.plan.lengths)), [f"{length:,}" for length in grid.plan.lengths])
        axes.set(xlabel="depth of the key", ylabel="length, tokens", title=title)
        figure.colorbar(image, ax=axes)
    save(figure, path)
