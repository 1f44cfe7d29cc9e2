"""Two runs or checkpoints side by side: how they learnt, and what they know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mixtral_jax.console import make_table, two_lines
from mixtral_jax.data.splits import MeasuredText
from mixtral_jax.evaluation.history import (
    HELD_OUT,
    LAST,
    History,
    at_end,
    draw_curve,
    held_out,
    median_rate,
    read_history,
)
from mixtral_jax.evaluation.loading import LoadedModel, load_model
from mixtral_jax.evaluation.modes import Report
from mixtral_jax.evaluation.perplexity import Difference, Evaluation, Result, difference
from mixtral_jax.evaluation.pictures import new_figure, save
from mixtral_jax.evaluation.results import measure_with_progress, numbers_of
from mixtral_jax.evaluation.texts import add_facts, describe, evaluation_texts, notes
from mixtral_jax.metrics import parameter_counts


@dataclass(frozen=True)
class Side:
    """What is known of one of the two."""

    path: str
    facts: dict[str, float | int | None]  # by name in the table
    tokenizer: str  # fingerprint
    step_tokens: float  # of a training step; of all its places where it is not known how many were padding
    history: History  # lines of metrics.jsonl up to the step
    evaluation: Evaluation
    texts: list[MeasuredText]
    notes: list[str]


def compare_runs(first: str, second: str, overrides: Sequence[str]) -> Report:
    """Measures both on the held-out text of their sources, each as its own record says, and reads their logs.

    Args:
        first: a run or one of its checkpoints.
        second: another.
        overrides: `section.key=value` for both; `data.sources` measures both on the same texts.

    Raises:
        UserError: what `load_model` and `measure` raise.
    """
    sides = [_look_at(path, list(overrides)) for path in (first, second)]
    shared = [name for name in sides[0].evaluation.sources if name in sides[1].evaluation.sources]
    differences = {name: difference(*[side.evaluation.sources[name] for side in sides]) for name in shared}
    if shared == list(sides[0].evaluation.sources) == list(sides[1].evaluation.sources):
        differences["total"] = difference(*[side.evaluation.total for side in sides])
    numbers = {
        "evaluation": "compare",
        "runs": [_side_json(side) for side in sides],
        "differences": differences,
    }
    return Report(
        [_facts_table(sides), _perplexity_table(sides, differences)],
        numbers,
        [f"{letter}: {note}" for letter, side in zip("AB", sides, strict=True) for note in side.notes],
        {"compare.png": lambda path: _draw(sides, path)},
    )


def _look_at(path: str, overrides: list[str]) -> Side:
    loaded = load_model(path, overrides)
    config = loaded.config
    texts = evaluation_texts(loaded)
    documents = [text.documents for text in texts]
    evaluation = measure_with_progress(loaded.score, documents, config.eval, config.data.seq_len)
    history = _history(Path(path), loaded.step)
    known = loaded.training_tokens
    step_tokens = known / loaded.step if known else config.train.batch_size * config.data.seq_len
    return Side(
        path, _facts(loaded, history), loaded.tokenizer.fingerprint, step_tokens, history, evaluation,
        texts, notes(texts, loaded.record),
    )  # fmt: skip


def _history(path: Path, step: int) -> History:
    """Reads the log of the run that a path lies in; nothing, if there is none (an import)."""
    return next(filter(None, (read_history(place, step) for place in (path, path.parent, path.parent.parent))), [])


def _facts(loaded: LoadedModel, history: History) -> dict[str, float | int | None]:
    counts = parameter_counts(loaded.config.model)
    return {
        "step": loaded.step,
        "parameters": counts.total,
        "active parameters": counts.active,
        "training tokens": loaded.training_tokens,
        "training nats/token": at_end(history, "cross_entropy"),
        "held-out nats/token": held_out(history),
        "load-balancing loss": at_end(history, "load_balance_loss"),
        "busiest expert, excess": at_end(history, "max_violation"),
        "dead experts": at_end(history, "dead_experts"),
        "tokens/s, median": median_rate(history),
    }


def _facts_table(sides: Sequence[Side]) -> Table:
    named = [f"{letter}: {side.path}" for letter, side in zip("AB", sides, strict=True)]
    table = make_table([""], named, f"of training: means of the last {LAST} logged steps", overflow="fold")
    table.add_row("tokenizer", *[side.tokenizer[:12] for side in sides])
    for name in sides[0].facts:
        table.add_row(name, *(_fact_text(side.facts[name]) for side in sides))
    return table


def _fact_text(value: float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _perplexity_table(sides: Sequence[Side], differences: dict[str, Difference]) -> Table:
    kinds = [{text.documents.name: describe(text) for text in side.texts} for side in sides]
    table = make_table(
        ["text" if any(kind for side in kinds for kind in side.values()) else "held-out text"],
        ("perplexity\nA", "\nB", "bits/byte\nA", "\nB", "\nB - A"),
        "bits per byte compare across tokenizers, perplexities do not; below a difference its 95% interval",
        no_wrap=True,
    )
    named = [{**side.evaluation.sources, "total": side.evaluation.total} for side in sides]
    for name in _names(named):
        results = [side.get(name) for side in named]
        cells = [f"{result.perplexity:,.2f}" if result else "" for result in results]
        cells += [f"{result.bits_per_byte:.4f}" if result else "" for result in results]
        found = differences.get(name)
        last: str | Text = ""
        if found is not None:
            value = f"{found.bits_per_byte:+.4f}"
            last = value
            if found.interval is not None:
                last = two_lines(value, f"{found.interval[0]:+.4f} to {found.interval[1]:+.4f}")
        said = [f"{letter}: {side[name]}" for letter, side in zip("AB", kinds, strict=True) if side.get(name)]
        shown = two_lines(name, ", ".join(said)) if said else name
        table.add_row(shown, *cells, last, style="bold" if name == "total" else None)
    return table


def _side_json(side: Side) -> dict[str, Any]:
    numbers = {
        "path": side.path,
        "tokenizer": side.tokenizer,
        "facts": side.facts,
        "sources": {name: numbers_of(result) for name, result in side.evaluation.sources.items()},
        "total": numbers_of(side.evaluation.total),
    }
    return add_facts(numbers, side.texts)


def _names(measured: Sequence[Mapping[str, Result]]) -> list[str]:
    """The sources that either side has, and the total behind them."""
    return sorted(dict.fromkeys(name for side in measured for name in side), key="total".__eq__)


def _draw(sides: Sequence[Side], path: Path) -> None:
    """Draws losses, load and bits per byte of both."""
    figure, panels = new_figure(11.0, 7.5, 2, 2)
    measured = [{**side.evaluation.sources, "total": side.evaluation.total} for side in sides]
    names = _names(measured)
    for number, (letter, side) in enumerate(zip("AB", sides, strict=True)):
        colour, label = f"C{number}", f"{letter}: {Path(side.path).name}"
        for axes, key, name in (
            (panels[0, 0], "cross_entropy", "training batch, nats per token"),
            (panels[0, 1], HELD_OUT, "held-out text, nats per token"),
            (panels[1, 0], "max_violation", "busiest expert above the uniform load"),
        ):
            draw_curve(axes, side.history, key, side.step_tokens, color=colour, label=label)
            axes.set(xlabel="training tokens", title=name)
            axes.locator_params(axis="x", nbins=6)
        axes = panels[1, 1]
        places = [names.index(name) + 0.36 * (number - 0.5) for name in measured[number]]
        heights = [result.bits_per_byte for result in measured[number].values()]
        axes.bar(places, heights, 0.36, color=colour, label=label)
        axes.set_xticks(range(len(names)), names, rotation=20)
        axes.set(title="held-out text, bits per byte")
        axes.legend()
    save(figure, path)
