"""The runs of an experiment beside each other, from their own logs: means over seeds, and differences by pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mixtral_jax.config import Config
from mixtral_jax.console import make_table, two_lines
from mixtral_jax.evaluation.experiment_file import Run
from mixtral_jax.evaluation.history import HELD_OUT, LAST, History, at_end, draw_curve, median_rate, read_history
from mixtral_jax.evaluation.intervals import mean_interval
from mixtral_jax.evaluation.modes import Report
from mixtral_jax.evaluation.pictures import new_figure, save
from mixtral_jax.metrics import flops_per_token, parameter_counts

# What is compared: in the JSON, for people, the name in the log.
MEASURES = (("nats_per_token", "nats/token", HELD_OUT), ("bits_per_byte", "bits/byte", "bits_per_byte/total"))
# Of the routers at the end of training: in the log, for people, how it is shown.
ROUTERS = (
    ("load_balance_loss", "balance\nloss", ".3f"),
    ("max_violation", "busiest,\nexcess", ".2f"),
    ("dead_experts", "dead\nexperts", ".1f"),
    ("router_entropy", "entropy,\nnats", ".2f"),
    ("dropped_share", "dropped", ".1%"),
)


@dataclass(frozen=True)
class Seed:
    """A run and its log."""

    config: Config
    history: History

    @property
    def step_tokens(self) -> float:
        """Tokens of a step."""
        return 1.0 * self.config.train.batch_size * self.config.data.seq_len

    @property
    def step_flops(self) -> float:
        """Useful FLOPs of a step."""
        return self.step_tokens * flops_per_token(self.config.model, self.config.data.seq_len)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step at the run's median speed; NaN where the log has no speed."""
        return self.step_tokens / (median_rate(self.history) or float("nan"))

    @property
    def measured(self) -> dict[str, Any]:
        """The last measurement of held-out text, as it was logged."""
        return next((entry for entry in reversed(self.history) if HELD_OUT in entry), {})

    def last(self, name: str) -> float:
        """The last measurement under a name of the log; NaN where it is not finite."""
        found = [entry[name] for entry in self.history if name in entry][-1]
        return float("nan") if found is None else found


Variants = Mapping[str, Mapping[int, Seed]]  # by name and seed


def read_seed(config: Config) -> Seed | None:
    """Reads what a run's log says; None where its last step was not measured yet."""
    history = read_history(Path(config.run_dir))
    ended = any(HELD_OUT in entry and entry["step"] == config.train.steps for entry in history)
    return Seed(config, history) if ended else None


def plan(runs: Sequence[Run]) -> Table:
    """Makes a table of the runs: their numbers, what they cost, and which are done."""
    table = Table()
    for name in ("", "run", "parameters", "active", "tokens", "useful FLOPs", "state"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    for number, run in enumerate(runs):
        counts, steps, cost = parameter_counts(run.config.model), run.config.train.steps, Seed(run.config, [])
        state = "done" if read_seed(run.config) else "to go on" if Path(run.config.run_dir).exists() else "to do"
        tokens, flops = f"{steps * cost.step_tokens:,.0f}", f"{steps * cost.step_flops:.3g}"
        cells = (f"{counts.total:,}", f"{counts.active:,}", tokens, flops, state)
        table.add_row(str(number), str(run), *cells)
    return table


def outcome(runs: Sequence[Run]) -> Report:
    """Puts the variants of the runs that are done beside each other.

    Differences are to the first variant, of the seeds that both have.
    """
    variants: dict[str, dict[int, Seed]] = {run.variant: {} for run in runs}
    missing = []
    for run in runs:
        if seed := read_seed(run.config):
            variants[run.variant][run.seed] = seed
        else:
            missing.append(str(run))
    numbers = {name: _numbers(seeds, next(iter(variants.values()))) for name, seeds in variants.items() if seeds}
    notes = [f"not there yet: {', '.join(missing)}"] if missing else []
    content = {"evaluation": "experiment", "variants": numbers, "missing": missing}
    tables = [_table(numbers)]
    if any(len(found["by_source"]) > 1 for found in numbers.values()):
        tables.append(_sources_table(numbers))
    routed = {
        name: found
        for name, found in numbers.items()
        if any(seed.config.model.num_experts > 1 for seed in variants[name].values())
    }
    if routed:
        tables.append(_routers_table(routed))
    return Report(tables, content, notes, {"experiment.png": lambda path: _draw(variants, path)})


def _numbers(seeds: Mapping[int, Seed], first: Mapping[int, Seed]) -> dict[str, Any]:
    """What is known of a variant; numbers that are not finite are None, as JSON has it."""
    some = next(iter(seeds.values()))
    counts, steps = parameter_counts(some.config.model), some.config.train.steps
    found: dict[str, Any] = {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "tokens": round(steps * some.step_tokens),
        "flops": steps * some.step_flops,
        "seconds": _finite(np.mean([steps * seed.step_seconds for seed in seeds.values()])),
        **{name: {seed: at_end(run.history, name) for seed, run in seeds.items()} for name, *_ in ROUTERS},
        "curve": {  # tokens, held-out nats per token
            seed: [(entry["step"] * run.step_tokens, entry[HELD_OUT]) for entry in run.history if HELD_OUT in entry]
            for seed, run in seeds.items()
        },
        "held_out": {
            seed: {name: value for entry in run.history if HELD_OUT in entry for name, value in entry.items()}
            for seed, run in seeds.items()
        },
    }
    found |= {name: _compared(seeds, first, logged) for name, _, logged in MEASURES}
    names = [source.name for source in some.config.data.sources if f"bits_per_byte/{source.name}" in some.measured]
    found["by_source"] = {name: _compared(seeds, first, f"bits_per_byte/{name}") for name in names}
    return found


def _compared(seeds: Mapping[int, Seed], first: Mapping[int, Seed], logged: str) -> dict[str, Any]:
    """Summarises the last measurement under a name of the log, and its differences to the first variant."""
    values = np.array([run.last(logged) for run in seeds.values()])
    both = [(run, first[seed]) for seed, run in seeds.items() if seed in first and logged in first[seed].measured]
    pairs = np.array([run.last(logged) - other.last(logged) for run, other in both])
    return {
        "mean": _finite(values.mean()),
        "spread": _finite(values.std(ddof=1)) if len(values) > 1 else None,
        "difference": _finite(pairs.mean()) if len(pairs) else None,
        "interval": mean_interval(pairs) if np.isfinite(pairs).all() else None,
    }


def _finite(value: float | np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None


def _table(numbers: Mapping[str, dict[str, Any]]) -> Table:
    table = make_table(
        ["variant"],
        ("parameters\nactive", "tokens\nFLOPs\nseconds", *(name for _, name, _ in MEASURES)),
        "held-out text: mean and standard deviation over seeds; below, the mean difference to the first variant, seed "
        "by seed, with its 95% interval. FLOPs: useful ones; seconds: of the steps alone, at their median speed",
        no_wrap=True,
    )
    for number, (variant, found) in enumerate(numbers.items()):
        count = len(found["held_out"])
        seconds = "no speed" if found["seconds"] is None else f"{found['seconds']:,.0f}"  # no whole interval was logged
        table.add_row(
            two_lines(variant, f"{count} seed{'s' * (count > 1)}"),
            two_lines(f"{found['parameters']:,}", f"{found['active_parameters']:,}"),
            two_lines(f"{found['tokens']:,}", f"{found['flops']:.3g}\n{seconds}"),
            *(_measure(found[name], number > 0) for name, _, _ in MEASURES),
        )
    return table


def _sources_table(numbers: Mapping[str, dict[str, Any]]) -> Table:
    table = make_table(("source", "variant"), ["bits/byte"], "held-out text of each source; below, as above")
    for source in dict.fromkeys(name for found in numbers.values() for name in found["by_source"]):
        for number, (variant, found) in enumerate(numbers.items()):
            if source in found["by_source"]:
                table.add_row(source, variant, _measure(found["by_source"][source], number > 0))
        table.add_section()
    return table


def _routers_table(numbers: Mapping[str, dict[str, Any]]) -> Table:
    table = make_table(
        ["variant"],
        [name for _, name, _ in ROUTERS],
        f"routers, means over seeds and the last {LAST} logged steps: balancing loss, 1 at balance; the busiest "
        "expert's share above the uniform one; experts without a token in a step; assignments without room",
    )
    for variant, found in numbers.items():
        values = [list(found[name].values()) for name, *_ in ROUTERS]
        means = [None if None in seeds else float(np.mean(seeds)) for seeds in values]
        cells = ["" if mean is None else format(mean, form) for mean, (*_, form) in zip(means, ROUTERS, strict=True)]
        table.add_row(variant, *cells)
    return table


def _measure(found: Mapping[str, Any], compared: bool) -> Any:
    spread = "" if found["spread"] is None else f" ± {found['spread']:.4f}"
    below = []
    if compared and found["difference"] is not None:
        below.append(f"{found['difference']:+.4f}")
        if found["interval"] is not None:
            below.append("{:+.4f} to {:+.4f}".format(*found["interval"]))
    return two_lines(_shown(found["mean"], ".4f") + spread, "\n".join(below))


def _shown(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _draw(variants: Variants, path: Path) -> None:
    """Draws the held-out loss of every run over tokens, useful FLOPs and seconds."""
    figure, panels = new_figure(13.0, 4.2, 1, 3, sharey=True)
    for axes, name, worth in zip(
        panels[0], ("tokens", "useful FLOPs", "seconds"), ("step_tokens", "step_flops", "step_seconds"), strict=True
    ):
        for number, (variant, seeds) in enumerate(variants.items()):
            for count, seed in enumerate(seeds.values()):
                label = "_" if count else variant  # once in the legend
                draw_curve(axes, seed.history, HELD_OUT, getattr(seed, worth), color=f"C{number}", label=label)
        axes.set(xlabel=name)
    panels[0, 0].set(ylabel="held-out text, nats per token")
    panels[0, 0].legend()
    save(figure, path)
