"""Pictures of routing, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.evaluation.ablation import Ablation
from mixtral_jax.evaluation.pictures import new_figure, save
from mixtral_jax.evaluation.routing import RoutingCounts, own_shares, random_repeats
from mixtral_jax.evaluation.routing_page import RoutedText, expert_colour
from mixtral_jax.evaluation.routing_tables import Piece, shown_layers
from mixtral_jax.evaluation.saturation import Moment

LINE = 44  # characters of a line of coloured text
LINES = 30
FREQUENT = 30  # pieces of text that are drawn


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
            axes.set_xticks(_some(experts))
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


def draw_together(total: RoutingCounts, path: Path) -> None:
    """Draws how often pairs of experts are chosen together, in three layers."""
    shown = shown_layers(len(total.together))
    figure, panels = new_figure(4.6 * len(shown), 4.4, 1, len(shown))
    found = total.coactivation()
    for pairs in found:
        np.fill_diagonal(pairs, np.nan)  # an expert is always chosen with itself
    for axes, layer in zip(panels[0], shown, strict=True):
        image = _heat(axes, found[layer], "viridis", (0.0, max(0.01, np.nanmax(found, initial=0))), "{:.0%}")
        axes.set(xlabel="expert that is chosen, too", title=f"layer {layer}")
    panels[0, 0].set_ylabel("expert")
    figure.colorbar(image, ax=list(panels[0]), label="share of the expert's tokens")
    save(figure, path)


def draw_sources(counts: Mapping[str, RoutingCounts], path: Path) -> None:
    """Draws from which source each expert gets its tokens, each source counted alike, in three layers."""
    own = own_shares(list(counts.values()))
    sources, layers, experts = own.shape
    shown = shown_layers(layers)
    figure, panels = new_figure((1.6 + 0.55 * sources) * len(shown), 1.2 + 0.3 * experts, 1, len(shown), sharey=True)
    for axes, layer in zip(panels[0], shown, strict=True):
        _heat(axes, own[:, layer].T, "viridis", (0.0, 1.0), "{:.0%}")
        axes.set_xticks(range(sources), list(counts), rotation=45)
        axes.set(title=f"layer {layer}")
    panels[0, 0].set(ylabel="expert")
    figure.suptitle("from which source an expert has its tokens", fontsize=10)
    save(figure, path)


def draw_vocabulary(total: RoutingCounts, piece: Piece, path: Path) -> None:
    """Draws to which expert the most frequent pieces of text go first, in three layers."""
    shown = shown_layers(len(total.pieces))
    often = np.argsort(-total.pieces[0].sum(axis=-1), kind="stable")[:FREQUENT]
    experts = total.pieces.shape[-1]
    width = 1.2 + min(0.28 * experts, 3.6)
    figure, panels = new_figure(width * len(shown), 1.0 + 0.2 * len(often), 1, len(shown), sharey=True)
    shares = total.vocabulary()
    for axes, layer in zip(panels[0], shown, strict=True):
        image = _heat(axes, shares[layer, often], "viridis", (0.0, 1.0), "")
        axes.set(xlabel="expert that is the first choice", title=f"layer {layer}")
    panels[0, 0].set_yticks(range(len(often)), [piece(int(token)) for token in often], family="monospace", fontsize=8)
    figure.colorbar(image, ax=list(panels[0]), label="share of the piece's tokens")
    save(figure, path)


def draw_paths(total: RoutingCounts, path: Path) -> None:
    """Draws the ways of tokens by their first choices; the wider a line, the more take it."""
    from matplotlib import colormaps

    steps, times = total.path_table()
    layers, experts = steps.shape[1], total.together.shape[-1]
    figure, panels = new_figure(1.5 + 1.6 * layers, 1.5 + min(0.35 * experts, 7))
    axes = panels[0, 0]
    flows = np.zeros((layers - 1, experts, experts))
    for layer, flow in enumerate(flows):
        np.add.at(flow, (steps[:, layer], steps[:, layer + 1]), times / total.tokens)
    widest = flows.max(initial=0)
    for layer, start, end in zip(*np.nonzero(flows > widest / 30), strict=True):
        width, colour = 8 * flows[layer, start, end] / widest, colormaps["turbo"](start / experts)
        axes.plot([layer, layer + 1], [start, end], color=colour, lw=width, alpha=0.7, solid_capstyle="butt")
    first = total.shares(0)
    for layer in range(layers):
        axes.scatter(np.full(experts, layer), range(experts), s=10 + 600 * first[layer], color="black", zorder=3)
    axes.set(xlabel="layer", ylabel="first choice", title="ways of tokens from layer to layer")
    axes.set_xticks(range(layers))
    axes.set_yticks(_some(experts))
    axes.invert_yaxis()
    save(figure, path)


def draw_ablation(ablation: Ablation, path: Path) -> None:
    """Draws what each expert's absence costs each source, in three layers, each with its own colours."""
    names = [*ablation.whole.sources, "total"]
    layers, experts = (1 + max(places) for places in zip(*ablation.without, strict=True))
    cost = np.zeros((layers, experts, len(names)))
    for place, changes in ablation.without.items():
        cost[place] = [1000 * changes[name].bits_per_byte for name in names]
    shown = shown_layers(layers)
    figure, panels = new_figure((1.8 + 0.6 * len(names)) * len(shown), 1.3 + 0.3 * experts, 1, len(shown), sharey=True)
    for axes, layer in zip(panels[0], shown, strict=True):
        far = max(np.abs(cost[layer]).max(), 0.1)
        _heat(axes, cost[layer].round(1) + 0.0, "RdBu_r", (-far, far), "{:.1f}")  # the sum has no -0
        axes.set_xticks(range(len(names)), names, rotation=45)
        axes.set(title=f"layer {layer}")
    panels[0, 0].set(ylabel="expert switched off")
    figure.suptitle("change of bits per byte, thousandths; colours by layer", fontsize=10)
    save(figure, path)


def draw_saturation(moments: Sequence[Moment], path: Path) -> None:
    """Draws saturation, the routers' entropy and the busiest expert's load of each layer over a run's checkpoints."""
    layers, experts = moments[0].shares.shape
    figure, panels = new_figure(13.0, 4.2, 1, 3)
    steps = [moment.step for moment in moments]
    measured = (
        ("saturation: choices as in the last checkpoint", [m.saturation for m in moments], None),
        ("entropy of a router's probabilities, nats", [m.router_entropy for m in moments], np.log(experts)),
        ("busiest expert / uniform load", [m.shares.max(axis=-1) * experts for m in moments], 1),
    )
    for axes, (title, values, line) in zip(panels[0], measured, strict=True):
        for layer, curve in enumerate(np.transpose(values)):
            colour = (0.1, 0.2 + 0.7 * layer / layers, 1 - 0.9 * layer / layers)
            axes.plot(steps, curve, "o-", ms=4, lw=1, color=colour, label=f"layer {layer}")
        if line is not None:
            axes.axhline(line, color="black", ls="--", lw=0.8)
        axes.set(xlabel="step", title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8, ncols=1 + layers // 9)
    save(figure, path)


def _heat(axes: Any, values: np.ndarray, colours: str, limits: tuple[float, float], form: str) -> Any:
    """Draws a matrix, with its numbers where there is room."""
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    rows, columns = values.shape
    if form and columns <= 8:
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            red, green, blue, _ = image.cmap(image.norm(values[row, column]))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axes.text(column, row, form.format(values[row, column]), ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(_some(columns))
    axes.set_yticks(_some(rows))
    return image


def _some(experts: int) -> range:
    """Chooses the experts whose numbers are written at an axis."""
    return range(0, experts, max(1, experts // 16))


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
