"""An evaluation as a table for people and as JSON for scripts."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mixtral_jax.config import EvalConfig
from mixtral_jax.console import make_table, two_lines
from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.intervals import Interval
from mixtral_jax.evaluation.perplexity import Evaluation, Result, measure
from mixtral_jax.evaluation.scoring import Score
from mixtral_jax.evaluation.windows import progress_line


def measure_with_progress(score: Score, texts: Sequence[Documents], eval: EvalConfig, seq_len: int) -> Evaluation:
    """Measures like `measure`, with a progress bar over the batches of all sources."""
    with progress_line("evaluate", texts, eval, seq_len) as progress:
        return measure(score, texts, eval, seq_len, progress.add)


def results_table(
    evaluation: Evaluation, baselines: Mapping[str, Result] | None = None, kinds: Mapping[str, str] | None = None
) -> Table:
    """Makes a table: a row for each source, one for all together, one for each baseline on all of it.

    Args:
        evaluation: what was measured.
        baselines: results of simpler models on the same text, by name.
        kinds: of the sources that are not plain held-out text, what they are.

    Returns:
        A table that a rich console prints.
    """
    cut = f", stride {evaluation.stride:,}" if evaluation.mode == "strided" else ""
    known = any(len(stratum) > 1 for result in evaluation.sources.values() for stratum in result.documents)
    note = "; below each number its 95% interval over documents" if known else ""
    caption = f"{evaluation.mode} mode, context {evaluation.context:,} tokens{cut}{note}{_cut_documents(evaluation)}"
    kinds = {name: kind for name, kind in (kinds or {}).items() if kind}
    numbers = ("tokens", "bytes", "nats/token", "perplexity", "bits/byte")
    table = make_table(["text" if kinds else "held-out text"], numbers, caption, no_wrap=True)
    last = len(evaluation.sources) - 1
    for number, (name, result) in enumerate(evaluation.sources.items()):
        shown = two_lines(name, kinds[name]) if name in kinds else name
        table.add_row(shown, *_cells(result), end_section=number == last)
    table.add_row("total", *_cells(evaluation.total), style="bold", end_section=True)
    for name, result in (baselines or {}).items():
        table.add_row(f"{name} model", *_cells(result), style="dim")
    return table


def results_json(evaluation: Evaluation) -> dict[str, Any]:
    """Makes the object that scripts may rely on.

    Args:
        evaluation: what was measured.

    Returns:
        `sources` (by name) and `total`, each with `tokens`, `bytes`, `nats_per_token`, `perplexity`, `bits_per_byte`,
        the number of `documents` and the `intervals` of the three (95%, [low, high]; null where a source has fewer
        than two documents); `mode`, `context`, `stride`.
    """
    return {
        "sources": {name: numbers_of(result) for name, result in evaluation.sources.items()},
        "total": numbers_of(evaluation.total),
        "mode": evaluation.mode,
        "context": evaluation.context,
        "stride": evaluation.stride,
    }


def _cut_documents(evaluation: Evaluation) -> str:
    """Says how many documents are longer than the context, where that makes them lose their begin."""
    lengths = [stratum[:, 0] for result in evaluation.sources.values() for stratum in result.documents]
    longer = sum(int((tokens > evaluation.context).sum()) for tokens in lengths)
    if evaluation.mode != "document" or not longer:
        return ""
    whole = sum(map(len, lengths))
    return f"; {longer:,} of {whole:,} documents are longer and go on in new windows without memory"


def _cells(result: Result) -> list[str | Text]:
    intervals = result.intervals()
    cells: list[str | Text] = [f"{result.tokens:,}", f"{result.bytes:,}"]
    for name, digits, coarse in (
        ("nats_per_token", ".4f", ".3f"),
        ("perplexity", ",.2f", ",.2f"),
        ("bits_per_byte", ".4f", ".3f"),
    ):
        cell = f"{getattr(result, name):{digits}}"
        if intervals is not None:
            cells.append(two_lines(cell, interval_text(getattr(intervals, name), coarse)))
        else:
            cells.append(cell)
    return cells


def interval_text(bounds: Interval | None, digits: str) -> str:
    """Writes an interval; nothing where there is none."""
    return "" if bounds is None else f"{bounds[0]:{digits}}\N{EN DASH}{bounds[1]:{digits}}"


def numbers_of(result: Result) -> dict[str, Any]:
    """Makes the JSON of one result; see `results_json`."""
    intervals = result.intervals()
    return {
        "tokens": result.tokens,
        "bytes": result.bytes,
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "documents": sum(len(stratum) for stratum in result.documents),
        "intervals": None if intervals is None else intervals._asdict(),
    }
