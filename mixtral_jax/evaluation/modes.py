"""What `eval.py` can measure: each mode turns a loaded model into a `Report` of tables, numbers and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from mixtral_jax.config import UserError
from mixtral_jax.console import ProgressLine
from mixtral_jax.distributed.processes import is_main
from mixtral_jax.evaluation import pictures, routing_pictures
from mixtral_jax.evaluation.ablation import measure_ablation
from mixtral_jax.evaluation.context import context_json, context_lengths, context_table, measure_contexts, num_windows
from mixtral_jax.evaluation.loading import LoadedModel
from mixtral_jax.evaluation.outputs import write_json
from mixtral_jax.evaluation.passkey import PasskeyPlan, measure_passkey, passkey_json, passkey_lengths, passkey_table
from mixtral_jax.evaluation.requests import answer
from mixtral_jax.evaluation.results import measure_with_progress, results_json, results_table
from mixtral_jax.evaluation.routing import all_sources, measure_routing
from mixtral_jax.evaluation.routing_page import route_sample, routing_page
from mixtral_jax.evaluation.routing_tables import (
    ablation_json,
    ablation_table,
    paths_json,
    paths_table,
    routing_json,
    routing_table,
    saturation_json,
    saturation_table,
    sources_table,
    together_table,
    vocabulary_json,
    vocabulary_table,
)
from mixtral_jax.evaluation.saturation import measure_saturation
from mixtral_jax.evaluation.scoring import Route, make_router, make_scorer
from mixtral_jax.evaluation.tasks import measure_tasks, tasks_table
from mixtral_jax.evaluation.texts import add_facts, describe, evaluation_texts, notes
from mixtral_jax.evaluation.windows import progress_line
from mixtral_jax.runs.restoring import restore_model


@dataclass(frozen=True)
class Report:
    """What a mode found."""

    tables: Sequence[RenderableType]
    numbers: dict[str, Any]  # JSON
    notes: Sequence[str] = ()  # lines below the tables
    # By file name: what writes it.
    pictures: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)


def perplexity(loaded: LoadedModel) -> Report:
    """Measures perplexity, source by source, as `eval.mode` says."""
    config = loaded.config
    found = evaluation_texts(loaded)
    texts = [text.documents for text in found]
    evaluation = measure_with_progress(loaded.score, texts, config.eval, config.data.seq_len)
    numbers = add_facts(results_json(evaluation), found) | _about(loaded)
    draw = {"perplexity.png": lambda path: pictures.draw_perplexity(evaluation, path)}
    table = results_table(evaluation, kinds={text.documents.name: describe(text) for text in found})
    return Report([table], numbers, notes(found, loaded.record), draw)


def context(loaded: LoadedModel) -> Report:
    """Measures what more context is worth, up to `eval.context`."""
    lengths = context_lengths(loaded.context, loaded.row_multiple)
    found = evaluation_texts(loaded)
    texts, most = [text.documents for text in found], loaded.config.eval.max_tokens
    total = sum(num_windows(text, loaded.context, most) for text in texts) * len(lengths)
    with ProgressLine("context", total, plain_line_seconds=30.0) as progress:
        curves = {
            text.name: measure_contexts(loaded.score, text, lengths, loaded.batch_tokens, most, progress.add)
            for text in texts
        }
    return Report(
        [context_table(curves)],
        add_facts(context_json(curves), found) | _about(loaded),
        notes(found, loaded.record),
        {"context.png": lambda path: pictures.draw_context(curves, path)},
    )


def passkey(loaded: LoadedModel) -> Report:
    """Hides keys in texts of up to `eval.context` tokens and asks for them."""
    plan = PasskeyPlan(passkey_lengths(loaded.tokenizer, loaded.context), loaded.config.seed)
    answers = partial(answer, loaded, context=loaded.context, title="passkey", what="the passkey texts")
    grid = measure_passkey(answers, loaded.tokenizer, plan)
    return Report(
        [passkey_table(grid)],
        passkey_json(grid) | _about(loaded),
        pictures={"passkey.png": lambda path: pictures.draw_passkey(grid, path)},
    )


def routing(loaded: LoadedModel) -> Report:
    """Counts which experts the tokens of each source go to, cut as for perplexity; one pass feeds all of it."""
    config, model = loaded.config, loaded.config.model
    found = evaluation_texts(loaded)
    texts = [text.documents for text in found]
    route = make_router(loaded.architecture)(loaded.arrays)
    seq_len, experts = config.data.seq_len, model.num_experts
    with progress_line("routing", texts, config.eval, seq_len) as progress:
        counts = {text.name: measure_routing(route, text, config.eval, seq_len, model, progress.add) for text in texts}
    total = all_sources(list(counts.values()), model)
    samples = [route_sample(route, text, loaded.tokenizer.decode, loaded.context) for text in texts]
    piece = partial(_piece, loaded)
    vocabulary, paths = vocabulary_json(total, piece), paths_json(total, counts)
    return Report(
        [routing_table(counts), together_table(total), sources_table(counts), vocabulary_table(vocabulary),
         paths_table(paths)],
        add_facts(routing_json(counts), found) | {"vocabulary": vocabulary, "paths": paths} | _about(loaded),
        notes(found, loaded.record),
        {
            "routing_shares.png": lambda path: routing_pictures.draw_shares(counts, path),
            "routing_repeats.png": lambda path: routing_pictures.draw_repeats(counts, path),
            "routing_load.png": lambda path: routing_pictures.draw_batch_load(counts, path),
            "routing_text.png": lambda path: routing_pictures.draw_text(samples[0], experts, path),
            "routing_together.png": lambda path: routing_pictures.draw_together(total, path),
            "routing_sources.png": lambda path: routing_pictures.draw_sources(counts, path),
            "routing_vocabulary.png": lambda path: routing_pictures.draw_vocabulary(total, piece, path),
            "routing_paths.png": lambda path: routing_pictures.draw_paths(total, path),
            "routing.html": lambda path: path.write_text(routing_page(samples, experts), encoding="utf-8"),
        },
    )  # fmt: skip


def ablation(loaded: LoadedModel) -> Report:
    """Measures what each source loses without each expert, cut as for perplexity."""
    config, model = loaded.config, loaded.config.model
    found = evaluation_texts(loaded)
    texts = [text.documents for text in found]
    score_of = make_scorer(loaded.architecture)
    cut = config.eval, config.data.seq_len
    with progress_line("ablation", texts, *cut, passes=1 + model.num_layers * model.num_experts) as progress:
        measured = measure_ablation(score_of, loaded.arrays, texts, *cut, model, progress.add)
    return Report(
        [ablation_table(measured)],
        add_facts(ablation_json(measured), found) | _about(loaded),
        notes(found, loaded.record),
        {"ablation.png": lambda path: routing_pictures.draw_ablation(measured, path)},
    )


def saturation(loaded: LoadedModel) -> Report:
    """Compares the routers of the run's earlier checkpoints with those of the one that was named."""
    config, checkpoints, last = loaded.config, loaded.checkpoints, loaded.step
    earlier = [step for step in checkpoints.steps() if step < last and checkpoints.find_damage(step) is None]
    if not earlier:
        raise UserError(
            f"{checkpoints.directory} has no good checkpoint before step {last}, with which it could be compared: keep "
            "some with checkpoint.keep or checkpoint.keep_every"
        )
    found = evaluation_texts(loaded)
    texts = [text.documents for text in found]
    router = make_router(loaded.architecture)

    def route_at(step: int) -> Route:
        if step == last:
            return router(loaded.arrays)
        return router(restore_model(checkpoints, step, loaded.architecture, config.init_from))

    cut = config.eval, config.data.seq_len
    with progress_line("saturation", texts, *cut, passes=1 + len(earlier)) as progress:
        moments = measure_saturation([*earlier, last], route_at, texts, *cut, config.model, progress.add)
    numbers = saturation_json(moments) | {"sources": {text.name: {} for text in texts}}
    return Report(
        [saturation_table(moments, config.model.num_experts_per_tok)],
        add_facts(numbers, found) | _about(loaded),
        notes(found, loaded.record),
        {"saturation.png": lambda path: routing_pictures.draw_saturation(moments, path)},
    )


def tasks(loaded: LoadedModel, names: Sequence[str]) -> Report:
    """Runs tasks of lm-evaluation-harness."""
    results = measure_tasks(loaded, names)
    numbers = {"evaluation": "tasks", "tasks": results} | _about(loaded)
    return Report([tasks_table(results)], numbers, notes([], loaded.record))


MODES: dict[str, Callable[[LoadedModel], Report]] = {
    "perplexity": perplexity,
    "context": context,
    "passkey": passkey,
    "routing": routing,
    "ablation": ablation,
    "saturation": saturation,
}


def show(report: Report, console: Console, json_file: Path | None, plots: Path | None) -> None:
    """Prints a report and writes what was asked for; of several processes, only the first does.

    Raises:
        UserError: a file cannot be written.
    """
    if not is_main():
        return
    for table in report.tables:
        console.print(table)
    for note in report.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, report.numbers)
    if plots is not None and report.pictures:
        try:
            plots.mkdir(parents=True, exist_ok=True)
            for name, draw in report.pictures.items():
                draw(plots / name)
        except OSError as error:
            raise UserError(f"cannot draw into {plots}: {error.strerror}; give another directory to --plots") from None
        console.print(f"pictures: {', '.join(str(plots / name) for name in report.pictures)}")
    elif report.pictures:
        console.print("--plots DIR draws this", style="dim")


def _piece(loaded: LoadedModel, token: int) -> str:
    """A token's text in one line, with its spaces to be seen."""
    return repr(loaded.tokenizer.describe(token)[0])[1:-1].replace(" ", "\N{OPEN BOX}")


def _about(loaded: LoadedModel) -> dict[str, Any]:
    """Whose numbers they are: perplexities compare only where the tokenizer is the same."""
    return {"tokenizer": loaded.tokenizer.fingerprint, "checkpoint_step": loaded.step}
