"""Draws the pictures of the documentation from runs.

`python docs/plot_runs.py curve RUN docs/images/tiny.png`
`python docs/plot_runs.py balance RUN_WITH RUN_WITHOUT docs/images/balance.png`
`python docs/plot_runs.py sources RUN docs/images/languages.png`
`python docs/plot_runs.py runs RUN [RUN ...] docs/images/quantized.png`
`python docs/plot_runs.py gain docs/results/mixture_or_dense.json docs/images/gain.png`
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mixtral_jax import cli
from mixtral_jax.config import UserError
from mixtral_jax.runs.metrics_file import read_metrics

Entries = list[dict[str, Any]]


def split(run: str) -> tuple[Entries, Entries]:
    """Reads a run's training lines and its evaluation lines."""
    log = Path(run) / "metrics.jsonl"
    if not log.is_file():
        raise UserError(f"there is no {log}: name a run directory")
    entries = list(read_metrics(log))
    return [e for e in entries if "loss" in e], [e for e in entries if "heldout/total" in e]


def draw_curve(run: str, picture: str) -> None:
    """Draws cross-entropy and held-out nats per token over the tokens seen."""
    training, heldout = split(run)
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    axes.plot([e["step"] for e in training], [e["cross_entropy"] for e in training], label="training batch", lw=1)
    axes.plot([e["step"] for e in heldout], [e["heldout/total"] for e in heldout], "o-", label="held-out text")
    axes.set(xlabel="step", ylabel="nats per token", title=f"{Path(run).name}: cross-entropy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def draw_balance(with_loss: str, without: str, picture: str) -> None:
    """Draws the busiest and the idlest expert's load of two runs, relative to the uniform load."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, run, title in zip(panels, (with_loss, without), ("load-balancing loss on", "off"), strict=True):
        training, _ = split(run)
        load = np.array([e["expert_load"] for e in training]) * len(training[0]["expert_load"][0])
        steps = [e["step"] for e in training]
        for layer in range(load.shape[1]):
            line = axes.plot(steps, load[:, layer].max(-1), label=f"layer {layer}", lw=1)[0]
            axes.plot(steps, load[:, layer].min(-1), color=line.get_color(), lw=1, ls=":")
        axes.axhline(1, color="black", lw=0.7)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("load / uniform load\n(busiest solid, idlest dotted)")
    panels[1].legend()
    figure.savefig(picture, dpi=120)


def draw_sources(run: str, picture: str) -> None:
    """Draws held-out nats per token of each source, and which share of the tokens seen was the source's."""
    training, heldout = split(run)
    names = [key.removeprefix("tokens_seen/") for key in training[0] if key.startswith("tokens_seen/")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    seen = np.array([[e[f"tokens_seen/{name}"] for name in names] for e in training])
    for column, name in enumerate(names):
        nats = [e[f"heldout/{name}"] for e in heldout]
        left.plot([e["step"] for e in heldout], nats, "o-", label=name)
        right.plot([e["step"] for e in training], seen[:, column] / seen.sum(1), label=name)
    left.set(xlabel="step", ylabel="nats per token", title=f"{Path(run).name}: held-out text by source")
    right.set(xlabel="step", title="share of the tokens seen", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(picture, dpi=120)


def draw_runs(*runs_and_picture: str) -> None:
    """Draws held-out nats per token of several runs, and how far each is from the first."""
    *runs, picture = runs_and_picture
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    first = {e["step"]: e["heldout/total"] for e in split(runs[0])[1]}
    for run in runs:
        nats = {e["step"]: e["heldout/total"] for e in split(run)[1]}
        both = [step for step in nats if step in first]
        left.plot(list(nats), list(nats.values()), "o-", ms=3, lw=1, label=Path(run).name)
        right.plot(both, [nats[step] - first[step] for step in both], "o-", ms=3, lw=1, label=Path(run).name)
    left.set(xlabel="step", ylabel="nats per token", title="held-out text")
    right.set(xlabel="step", title=f"difference from {Path(runs[0]).name}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(picture, dpi=120)


def draw_gain(results: str, picture: str) -> None:
    """Draws what an experiment wrote with --json: the first two variants' loss, and the second's gain seed by seed."""
    variants = json.loads(Path(results).read_text())["variants"]
    (first, base), (second, other) = list(variants.items())[:2]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for number, (name, found) in enumerate(((first, base), (second, other))):
        curves = np.array(list(found["curve"].values()))  # seeds, measurements, tokens and nats
        active = f"{found['active_parameters'] / 1e6:.2f}M of {found['parameters'] / 1e6:.2f}M parameters a token"
        tokens = curves[0, :, 0] / 1e6
        left.plot(tokens, curves[..., 1].mean(axis=0), "o-", color=f"C{number}", label=f"{name}: {active}")
        for curve in curves:
            left.plot(tokens, curve[:, 1], color=f"C{number}", lw=0.7, alpha=0.5)
    for number, (seed, curve) in enumerate(other["curve"].items(), 2):
        gain = np.array(base["curve"][seed])[:, 1] - np.array(curve)[:, 1]
        right.plot(np.array(curve)[:, 0] / 1e6, gain, "o-", ms=4, lw=1, color=f"C{number}", label=f"seed {seed}")
    difference, (low, high) = -other["nats_per_token"]["difference"], other["nats_per_token"]["interval"]
    right.axhline(0, color="black", lw=0.8)
    left.set(xlabel="training tokens, millions", ylabel="nats per token", title="held-out text, mean and each seed")
    right.set(
        xlabel="training tokens, millions",
        ylabel="nats per token",
        ylim=(min(0, right.get_ylim()[0]), None),
        title=f"gain of the {second}; at the end {difference:.3f} ({-high:.3f} to {-low:.3f})",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
        axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)


def main(arguments: list[str]) -> None:
    """Draws the picture that the first argument names."""
    draw = {"curve": draw_curve, "balance": draw_balance, "sources": draw_sources, "runs": draw_runs, "gain": draw_gain}
    kind, *paths = arguments or [""]
    count = len(paths) if kind == "runs" else 3 if kind == "balance" else 2
    if kind not in draw or len(paths) != count or count < 2:
        raise UserError(f"say {', '.join(draw)}, the runs, and the picture's file, such as curve runs/tiny tiny.png")
    draw[kind](*paths)


if __name__ == "__main__":
    cli.run(main)
