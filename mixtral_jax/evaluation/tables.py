"""The numbers of the modes beside perplexity, as tables for people and as JSON for scripts."""

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mixtral_jax.console import two_lines
from mixtral_jax.evaluation.context import ContextCurve
from mixtral_jax.evaluation.passkey import PasskeyGrid
from mixtral_jax.evaluation.results import interval_text
from mixtral_jax.evaluation.routing import RoutingCounts, random_repeats


def context_table(curves: Mapping[str, ContextCurve]) -> Table:
    """Makes a table: a row for each context, nats per token of each source, with intervals over windows."""
    first = next(iter(curves.values()))
    table = Table(
        caption=f"nats per token of the last {first.targets:,} targets of each window of {first.contexts[-1]:,} tokens"
    )
    table.add_column("context", justify="right")
    for name, curve in curves.items():
        table.add_column(two_lines(name, f"{curve.windows:,} windows"), justify="right")
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
    table = Table(
        caption=f"share of {grid.plan.trials} keys that greedy decoding writes, by length and depth of the key"
    )
    table.add_column("tokens", justify="right")
    for depth in grid.plan.depths:
        table.add_column(f"{depth:.0%}", justify="right")
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


def shown_layers(layers: int) -> list[int]:
    """Chooses the first, the middle and the last layer."""
    return sorted({0, layers // 2, layers - 1})


def routing_table(counts: Mapping[str, RoutingCounts]) -> Table:
    """Makes the paper's table 5 with the shares beside it, for the first, the middle and the last layer."""
    k, layers, num_experts = next(iter(counts.values())).assignments.shape
    random_first, random_any = random_repeats(num_experts, k)
    table = Table(
        caption=f"{k} of {num_experts} experts a token. share: of the assignments, least and most used expert. "
        "repeats: neighbouring tokens with the same first choice, or with any choice in common. busiest: the most used "
        "expert of a batch against the uniform load."
    )
    for name in ("layer", "source"):
        table.add_column(name)
    for name in ("share, %\n1st", "\nall", "repeats\n1st", "\nany", "busiest\nmean", "\nworst"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in shown_layers(layers):
        for number, (name, count) in enumerate(counts.items()):
            first, every = 100 * count.shares(0)[layer], 100 * count.shares()[layer]
            busiest = 1 + count.batch_violations()[:, layer]
            table.add_row(
                str(layer) if number == 0 else "",
                name,
                interval_text((first.min(), first.max()), ".1f"),
                interval_text((every.min(), every.max()), ".1f"),
                f"{count.first_repeats()[layer]:.1%}",
                f"{count.any_repeats()[layer]:.1%}",
                f"{busiest.mean():.2f}x",
                f"{busiest.max():.2f}x",
                end_section=number == len(counts) - 1,
            )
    uniform = f"{100 / num_experts:.1f}"
    table.add_row("", "random", uniform, uniform, f"{random_first:.1%}", f"{random_any:.1%}", "1.00x", "", style="dim")
    return table


def routing_json(counts: Mapping[str, RoutingCounts]) -> dict[str, Any]:
    """Makes `sources`: shares by choice, layer and expert, repetitions by layer, loads by batch; and `random`."""
    k, _, num_experts = next(iter(counts.values())).assignments.shape
    random_first, random_any = random_repeats(num_experts, k)
    return {
        "evaluation": "routing",
        "sources": {
            name: {
                "tokens": count.tokens,
                "pairs": count.pairs,
                "shares_by_choice": [count.shares(choice).tolist() for choice in range(k)],
                "shares": count.shares().tolist(),
                "repeats_first_choice": count.first_repeats().tolist(),
                "repeats_any_choice": count.any_repeats().tolist(),
                "max_violation_by_batch": count.batch_violations().tolist(),
            }
            for name, count in counts.items()
        },
        "random": {
            "share": 1 / num_experts,
            "repeats_first_choice": random_first,
            "repeats_any_choice": random_any,
        },
    }
