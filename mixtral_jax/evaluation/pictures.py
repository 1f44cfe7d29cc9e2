"""Pictures of what was measured, as PNG; matplotlib is imported only where one is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.evaluation.context import ContextCurve
from mixtral_jax.evaluation.passkey import PasskeyGrid
from mixtral_jax.evaluation.perplexity import Evaluation
from mixtral_jax.evaluation.routing import RoutedText, RoutingCounts, random_repeats
from mixtral_jax.evaluation.routing_page import expert_colour
from mixtral_jax.evaluation.tables import shown_layers

DPI = 120
LINE = 44  # characters of a line of coloured text
LINES = 30


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


def draw_shares(counts: Mapping[str, RoutingCounts], path: Path) -> None:
    """Draws each expert's share by source, of the first, the second and all choices, in three layers; as figure 7."""
    k, layers, experts = next(iter(counts.values())).assignments.shape
    shown = shown_layers(layers)
    choices: list[tuple[str, int | None]] = [("all choices", None)]
    if k > 1:
        choices = [("first choice", 0), ("second choice", 1), *choices]
    figure, panels = new_figure(4.4 * len(choices), 0.6 + 2.2 * len(shown), len(shown), len(choices), sharey=True)
    width = 0.8 / len(counts)
    for line, layer in zip(panels, shown, strict=True):
        for axes, (title, choice) in zip(line, choices, strict=True):
            for number, (name, count) in enumerate(counts.items()):
                places = np.arange(experts) - 0.4 + (number + 0.5) * width
                axes.bar(places, count.shares(choice)[layer], width, label=name)
            axes.axhline(1 / experts, color="black", ls="--", lw=0.8)
            axes.set_title(f"layer {layer}, {title}", fontsize=9)
            axes.set_xticks(range(experts) if experts <= 16 else range(0, experts, experts // 8))
        line[0].set_ylabel("share of assignments")
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    panels[0, 0].legend(fontsize=7, ncols=2)
    save(figure, path)


def draw_repeats(counts: Mapping[str, RoutingCounts], path: Path) -> None:
    """Draws how often neighbouring tokens repeat an expert, by layer and source, beside chance; as table 5."""
    k, layers, experts = next(iter(counts.values())).assignments.shape
    figure, panels = new_figure(10.0, 4.0, 1, 2)
    for axes, title, chance, values in zip(
        panels[0],
        ("same first choice", "any choice in common"),
        random_repeats(experts, k),
        (RoutingCounts.first_repeats, RoutingCounts.any_repeats),
        strict=True,
    ):
        for name, count in counts.items():
            axes.plot(range(layers), values(count), "o-", ms=4, label=name)
        axes.axhline(chance, color="black", ls="--", lw=0.8, label=f"random, {chance:.1%}")
        axes.set(xlabel="layer", ylabel="share of neighbouring tokens", title=title)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    save(figure, path)


def draw_batch_load(counts: Mapping[str, RoutingCounts], path: Path) -> None:
    """Draws the busiest expert's load in each layer: the median over batches, and where 90% of them lie."""
    figure, panels = new_figure(7.0, 4.0)
    axes = panels[0, 0]
    for number, (name, count) in enumerate(counts.items()):
        low, middle, high = np.quantile(1 + count.batch_violations(), [0.05, 0.5, 0.95], axis=0)
        layers = np.arange(len(middle)) + 0.04 * (number - (len(counts) - 1) / 2)
        axes.errorbar(layers, middle, [middle - low, high - middle], fmt="o", ms=4, capsize=2, label=name)
    axes.axhline(1, color="black", ls="--", lw=0.8, label="balance")
    axes.set(xlabel="layer", ylabel="busiest expert / uniform load", title="load of a batch: median, 5% to 95%")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def draw_text(text: RoutedText, num_experts: int, path: Path) -> None:
    """Draws a text three times, each token in the colour of its first choice in one layer; as figure 8."""
    from matplotlib.patches import Patch, Rectangle

    layers = shown_layers(text.experts.shape[1])
    places = list(lay_out(text.pieces))
    height = 1 + max(line for line, *_ in places)
    figure, panels = new_figure(4.6 * len(layers), 0.17 * height + 0.9, 1, len(layers))
    size = 4.4 * 72 / LINE / 0.602 * 0.93  # a character of DejaVu Sans Mono is 0.602 of the font's size wide
    for axes, layer in zip(panels[0], layers, strict=True):
        for line, column, piece, token in places:
            colour = expert_colour(int(text.experts[token, layer, 0]), num_experts)
            axes.add_patch(Rectangle((column, line), len(piece), 1, color=colour, lw=0))
            axes.text(column, line + 0.78, piece.replace("$", r"\$"), family="monospace", fontsize=size)
        axes.set(xlim=(0, LINE), ylim=(height, 0), xticks=[], yticks=[], title=f"{text.name}, layer {layer}")
    patches = [Patch(color=expert_colour(expert, num_experts), label=str(expert)) for expert in range(num_experts)]
    figure.legend(handles=patches[:32], loc="outside lower center", ncols=min(16, num_experts), fontsize=8)
    save(figure, path)


def lay_out(pieces: Sequence[str]) -> list[tuple[int, int, str, int]]:
    """Breaks pieces of text into lines: line, column, characters, number of the piece."""
    places = []
    line = column = 0
    for token, piece in enumerate(pieces):
        for number, part in enumerate(piece.split("\n")):
            if number:
                line, column = line + 1, 0
            while part:
                if column + len(part) > LINE and column:
                    line, column = line + 1, 0
                head, part = part[:LINE], part[LINE:]
                places.append((line, column, head.replace("\t", " "), token))
                column += len(head)
    return [place for place in places if place[0] < LINES] or [(0, 0, " ", 0)]
