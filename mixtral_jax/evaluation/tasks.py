"""Standard tasks through lm-evaluation-harness: its own by name, YAML files, or plain JSONL files."""

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mixtral_jax.config import UserError
from mixtral_jax.console import make_table, two_lines
from mixtral_jax.evaluation.loading import LoadedModel
from mixtral_jax.evaluation.texts import were_trained_on

Known = Callable[[Sequence[str]], Sequence[bool]]


def _with_space(record: Mapping[str, str]) -> str:
    """Parts the continuation from its context, as the harness does for the other kinds of task."""
    continuation = record["continuation"]
    return continuation if continuation[:1].isspace() else f" {continuation}"


# What the records of a JSONL file may hold, and the task that they then are: accuracy is the share of records whose
# right answer is the likeliest, acc_norm the same by log-likelihood per byte.
ACCURACY: Any = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
FORMS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": ACCURACY,
    },
    ("context_options", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": ACCURACY[:1],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": _with_space,
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    ("query", "answer"): {
        "output_type": "generate_until",
        "doc_to_text": "query",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    },
    ("text",): {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def check_harness() -> None:
    """Raises `UserError` where lm-evaluation-harness is missing; keeps it from forking a process that runs JAX."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness: pip install -r requirements-eval.txt")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its name for it; standard errors are then drawn in this process


def jsonl_task(path: Path) -> dict[str, Any]:
    """Makes the harness's description of the task that a JSONL file holds; see `FORMS`.

    Raises:
        UserError: the file cannot be read, is empty, or its records are of no known form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the task {path}: {getattr(error, 'strerror', error)}; name a JSONL file"
        ) from None
    records = []
    form: tuple[str, ...] = ()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"line {number} of {path} is not a JSON object: fix or remove it")
        form = form or next((fields for fields in FORMS if set(fields) <= set(record)), ())
        if not form or not set(form) <= set(record):
            known = "; ".join(", ".join(fields) for fields in ([form] if form else FORMS))
            raise UserError(f"line {number} of {path} has the fields {', '.join(record)}: it needs {known}")
        records.append({field: record[field] for field in form})
    if not records:
        raise UserError(f"the task {path} has no records: give it at least one line")

    def dataset(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict({"test": datasets.Dataset.from_list(records)})

    return {"task": path.stem, "custom_dataset": dataset, "test_split": "test", **FORMS[form]}


def run_tasks(model: Any, names: Sequence[str], known: Known | None = None) -> dict[str, Any]:
    """Runs tasks on a model of the harness.

    Args:
        model: an `lm_eval.api.model.LM`.
        names: JSONL files, YAML files in the harness's own language, or names of its tasks.
        known: says which of some texts the model was trained on; None: that is not known.

    Returns:
        For each task its `samples` (their number), `trained_on` (how many of them hold a text that the model was
        trained on; None: not known) and `metrics` (by name: `value` and `stderr`).

    Raises:
        UserError: a file or a task that cannot be had.
    """
    check_harness()
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is shown by the model, in lines that a file can hold
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about keys that we set on purpose
    logging.getLogger("datasets").setLevel(logging.ERROR)
    files = [name for name in names if name.endswith((".jsonl", ".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise UserError(f"there is no task file {name}: name a JSONL or YAML file, or a task of the harness")
    manager = TaskManager(include_defaults=len(files) < len(names))
    unknown = [name for name in names if name not in files and not manager.match_tasks([name])]
    if unknown:
        raise UserError(f"'{unknown[0]}' is no task of the harness and no .jsonl or .yaml file: see lm_eval ls tasks")
    wanted = [jsonl_task(Path(name)) if name.endswith(".jsonl") else name for name in names]
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # git complains at the terminal outside of a repository
    results = lm_eval.simple_evaluate(model=model, tasks=wanted, task_manager=manager)
    found = {}
    for task, numbers in results["results"].items():
        metrics: dict[str, Any] = {}
        for key, value in numbers.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else key
                stderr = numbers.get(f"{metric}_stderr,{filtered}")
                metrics[name] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
        samples = results["n-samples"].get(task, {}).get("effective")
        # A group of tasks has none of its own; several filters log a sample several times.
        logged = {sample["doc_id"]: _texts(sample) for sample in results["samples"].get(task, ())}
        trained_on = sum(map(any, _grouped(known, list(logged.values())))) if known and logged else None
        found[task] = {"samples": samples, "trained_on": trained_on, "metrics": metrics}
    return found


def _texts(sample: Mapping[str, Any]) -> list[str]:
    """The texts of a sample: its strings, and what the model was asked, in one piece."""
    asked = ["".join(part for part in parts if isinstance(part, str)) for parts in sample["arguments"]]
    strings = [value for value in sample["doc"].values() if isinstance(value, str)]
    return [text for text in dict.fromkeys([*strings, *asked]) if text.strip()]


def _grouped(known: Known, groups: Sequence[Sequence[str]]) -> Iterator[Sequence[bool]]:
    """Asks about many texts at once."""
    answers = iter(known([text for group in groups for text in group]))
    for group in groups:
        yield [next(answers) for _ in group]


def tasks_table(results: Mapping[str, Any]) -> Table:
    """Makes a table: a row for each metric of each task."""
    numbers = ("samples", "metric", "value", "standard error")
    table = make_table(["task"], numbers, "standard errors as lm-evaluation-harness estimates them")
    for task, result in results.items():
        for number, (metric, numbers) in enumerate(result["metrics"].items()):
            samples: str | Text = "" if result["samples"] is None else f"{result['samples']:,}"
            if result["trained_on"]:
                samples = two_lines(f"{samples}", f"{result['trained_on']:,} in training")
            first = [task, samples] if number == 0 else ["", ""]
            stderr = "" if numbers["stderr"] is None else f"{numbers['stderr']:.4f}"
            table.add_row(*first, metric, f"{numbers['value']:.4f}", stderr)
        table.add_section()
    return table


def measure_tasks(loaded: LoadedModel, names: Sequence[str]) -> dict[str, Any]:
    """Runs tasks on a checkpoint; see `run_tasks`."""
    check_harness()
    from mixtral_jax.evaluation.harness import MixtralJax

    record = loaded.record
    known = None if record is None else lambda texts: were_trained_on(texts, record, loaded.tokenizer).tolist()
    return run_tasks(MixtralJax(loaded), names, known)


def run_harness(arguments: Sequence[str]) -> None:
    """Calls lm-evaluation-harness's own command line, to which `--model mixtral_jax` is known.

    Raises:
        UserError: a task that it does not know.
    """
    check_harness()
    from lm_eval.__main__ import cli_evaluate

    importlib.import_module("mixtral_jax.evaluation.harness")
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise UserError(f"{str(error)[0].lower()}{str(error)[1:]}; see lm_eval ls tasks") from None
