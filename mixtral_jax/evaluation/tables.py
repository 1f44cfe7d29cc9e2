"""The numbers of the modes beside perplexity, as tables for people and as JSON for scripts."""

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mixtral_jax.console import make_table, two_lines
from mixtral_jax.evaluation.context import ContextCurve
from mixtral_jax.evaluation.passkey import PasskeyGrid
from mixtral_jax.evaluation.results import interval_text


def context_table(curves: Mapping[str, ContextCurve]) -> Table:
    """Makes a table: a row for each context, nats per token of each source, with intervals over windows."""
    first = next(iter(curves.values()))
    named = [two_lines(name, f"{curve.windows:,} windows") for name, curve in curves.items()]
    caption = f"nats per token of the last {first.targets:,} targets of each window of {first.contexts[-1]:,} tokens"
    table = make_table((), ["context", *named], caption)
    columns = [list(zip(curve.nats_per_token(), curve.intervals(), strict=True)) for curve in curves.values()]
    for row, context in enumerate(first.contexts):
        cells = [two_lines(f"{column[row][0]:.4f}", interval_text(column[row][1], ".2f")) for column in columns]
        table.add_row(f"{context:,}", *cells)
    return table


def context_json(curves: Mapping[str, ContextCurve]) -> dict[str, Any]:
    """Makes `sources`: by name, `windows`, `targets` of each, and the losses `by_context` and `by_position`."""
    sources = {}
    for name, curve in curves.items():
        by_context = zip(curve.contexts, curve.nats_per_token().tolist(), curve.intervals(), strict=True)
        sources[name] = {
            "windows": curve.windows,
            "targets": curve.targets,
            "by_context": [
                {"context": context, "nats_per_token": nats, "perplexity": math.exp(nats), "interval": bounds}
                for context, nats, bounds in by_context
            ],
            "by_position": [
                {"first": first, "last": last, "nats_per_token": nats} for first, last, nats in curve.by_position()
            ],
        }
    return {"evaluation": "context", "sources": sources}


def passkey_table(grid: PasskeyGrid) -> Table:
    """Makes a table of the accuracy: a row for each length, a column for each depth."""
    caption = f"share of {grid.plan.trials} keys that greedy decoding writes, by length and depth of the key"
    table = make_table((), ["tokens", *(f"{depth:.0%}" for depth in grid.plan.depths)], caption)
    table.add_column("nats/token", justify="right", style="dim")
    for length, accuracy, nats in zip(grid.plan.lengths, grid.accuracy, grid.nats_per_token, strict=True):
        table.add_row(f"{length:,}", *[f"{value:.0%}" for value in accuracy], f"{nats.mean():.3f}")
    return table


def passkey_json(grid: PasskeyGrid) -> dict[str, Any]:
    """Makes `lengths`, `depths`, `trials`, and by length and depth `accuracy` and `nats_per_token`."""
    return {
        "evaluation": "passkey",
        "lengths": list(grid.plan.lengths),
        "depths": list(grid.plan.depths),
        "trials": grid.plan.trials,
        "accuracy": grid.accuracy.tolist(),
        "nats_per_token": grid.nats_per_token.tolist(),
        "total": {"accuracy": float(grid.accuracy.mean()), "nats_per_token": float(grid.nats_per_token.mean())},
    }
