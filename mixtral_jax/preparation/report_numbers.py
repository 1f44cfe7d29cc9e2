"""The numbers of the report, gathered from what the tasks noted, and its terminal table."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import MetricStatsDict, PipelineStats
from rich.table import Table
from rich.text import Text

from mixtral_jax.config import UserError
from mixtral_jax.data.cache_files import write_file
from mixtral_jax.preparation.config import PrepareConfig
from mixtral_jax.preparation.examples import cluster_sizes
from mixtral_jax.preparation.plan import load_left_out
from mixtral_jax.preparation.report_page import make_page
from mixtral_jax.preparation.stages import Layout

Numbers = dict[str, Any]
EXAMPLES = 3  # of a reason
PROBLEMS = 200  # that are named
CLUSTERS = 10  # that are shown
UNITS = ("documents", "characters", "bytes", "tokens")


class ReportStep(PipelineStep):
    """Writes the report as the last job of a cluster."""

    type = "report"
    name = "report"

    def __init__(self, config: PrepareConfig):
        """Takes the whole configuration."""
        super().__init__()
        self._config = config

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Writes the files."""
        write_report(self._config)
        return None


def write_report(config: PrepareConfig) -> Numbers:
    """Writes `report.json`, `report.html` and `sources.yaml` into the output directory.

    Args:
        config: of the preparation, whose stages are done.

    Returns:
        What `report.json` holds.
    """
    layout = Layout(config)
    report = gather(config)
    write_file(layout.output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_file(layout.output / "report.html", make_page(report).encode())
    sources = [
        {"name": language, "prepared": str(layout.output / "tokens" / language), "weight": round(row["weight"], 6)}
        for language, row in report["languages"].items()
    ]
    block = {"data": {"tokenizer": str(layout.output / "tokenizer.model"), "sources": sources}}
    head = "# For the config of a training run; weights by tokens and temperature.\n"
    write_file(layout.output / "sources.yaml", (head + yaml.safe_dump(block, sort_keys=False)).encode())
    return report


def gather(config: PrepareConfig) -> Numbers:
    """Adds up what all tasks counted; see docs/preparation.md for the meaning of the fields."""
    layout = Layout(config)
    pages = _stage_statistics(layout.logs("pages"))
    documents = _stage_statistics(layout.logs("documents"))
    steps: list[Numbers] = []
    done: Counter[str] = Counter()  # what the step before a meter counted
    spent = 0.0  # seconds of the steps since the last meter
    for name, counts, seconds in pages + documents:
        if not name.startswith("meter: "):
            done, spent = counts, spent + seconds
            continue
        groups = _groups(counts)
        step: Numbers = {
            "step": name.removeprefix("meter: "),
            "out": _total(groups),
            "groups": groups,
            "seconds": spent,
        }
        step["in"] = steps[-1]["out"] if steps else step["out"]
        step["dropped"] = step["in"]["documents"] - step["out"]["documents"]
        if reasons := {label: n for label, n in done.most_common() if label.startswith("dropped_")}:
            step["reasons"] = {label.removeprefix("dropped_"): int(n) for label, n in reasons.items()}
        if done["handled"] and spent:  # a rule lets curated documents pass unseen
            step["bytes_per_second"] = int(done["handled"]) / spent
        steps.append(step)
        done, spent = Counter(), 0.0
    written = steps.pop()  # no step of its own: it counts what is written, and the lengths
    by_language = written["groups"]["languages"]
    weights = balanced_weights({language: row["tokens"] for language, row in by_language.items()}, config.temperature)
    for language, row in by_language.items():
        index = json.loads((layout.output / "tokens" / language / "index.json").read_text())
        row |= {"weight": weights.get(language, 0.0), "cache_tokens": index["num_tokens"], "content": index["content"]}
    read, problems = _input(pages)
    for source, left_out in load_left_out(config).items():
        read[source]["left_out"] = left_out
    return {
        "output": str(layout.output),
        "total": written["out"],
        "languages": by_language,
        "steps": steps,
        "input": read,
        "problems": {
            "counts": problems,
            "named": _lines(sorted((layout.pages / "problems").glob("*.jsonl")))[:PROBLEMS],
        },
        "tokenization": _tokenization(documents),
        "lengths": _lengths(counts),
        "examples": {step["step"]: found for step in steps if (found := _examples(layout.examples / step["step"]))},
        "clusters": {
            "sizes": cluster_sizes(layout.similar) if config.minhash.enabled else {},
            "shown": _clusters(layout) if config.minhash.enabled else [],
        },
        "contamination": _contamination(layout),
        "temperature": config.temperature,
    }


def balanced_weights(tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Gives every source a share that grows with the power 1 / temperature of its size.

    Args:
        tokens: of each source.
        temperature: 1 keeps the natural shares; more lifts small sources; towards infinity all are equal.

    Returns:
        Shares of those that have tokens; they add up to 1.

    Raises:
        UserError: the temperature is not above 0.

    Source: arXiv 1911.02116, section 3.1, whose alpha is 1 / temperature.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}: it must be greater than 0")
    largest = max(tokens.values(), default=0)
    powers = {name: (count / largest) ** (1 / temperature) for name, count in tokens.items() if count}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def results_table(report: Numbers) -> Table:
    """Renders what went into and came out of each step."""
    table = Table(title="documents, characters and tokens out of each step")
    table.add_column("step", no_wrap=True)
    for column in ("docs", "dropped", "chars", "tokens", "MB/s, share"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in report["steps"]:
        out = step["out"]
        share = step["dropped"] / max(1, step["in"]["documents"])
        speed = step.get("bytes_per_second", 0.0) / 1e6
        table.add_row(
            step["step"],
            f"{out['documents']:,}",
            f"{step['dropped']:,} ({share:.1%})" if step["dropped"] else "",
            _millions(out["characters"]),
            _millions(out["tokens"]) if out["tokens"] else "",
            f"{speed:.2f}" if speed else "",
        )
    table.add_section()
    for language, row in report["languages"].items():
        table.add_row(
            Text(language, "bold"), f"{row['documents']:,}", "", _millions(row["characters"]), _millions(row["tokens"]),
            f"{row['weight']:.1%}",
        )  # fmt: skip
    bad = sum(report["problems"]["counts"].values())
    if bad:
        table.caption = f"{bad} records or files could not be read; report.html names them"
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M"


def _stage_statistics(folder: Path) -> list[tuple[str, Counter[str], float]]:
    """Name, sums and seconds of every step of a stage, over all tasks."""
    files = sorted((folder / "stats").glob("*.json"))
    tasks = [PipelineStats.from_json(json.loads(file.read_text())) for file in files]
    steps = []
    for step in sum(tasks, PipelineStats()).stats:
        sums = MetricStatsDict() + step.stats  # of a lone task they are as the file has them
        counts = Counter({label: value.total for label, value in sums.items()})
        steps.append((step.name, counts, float(step.time_stats.total)))
    return steps


def _groups(counts: Counter[str]) -> Numbers:
    """Sums by source and by language of what a meter counted."""
    groups: Numbers = {"sources": {}, "languages": {}}
    for label, count in sorted(counts.items()):
        unit, _, group = label.partition("|")
        if unit in UNITS:
            source, _, language = group.partition("|")
            for kind, name in (("sources", source), ("languages", language)):
                row = groups[kind].setdefault(name, dict.fromkeys(UNITS, 0))
                row[unit] += int(count)
    return groups


def _total(groups: Numbers) -> dict[str, int]:
    return {unit: sum(row[unit] for row in groups["sources"].values()) for unit in UNITS}


def _input(steps: list[tuple[str, Counter[str], float]]) -> tuple[Numbers, dict[str, int]]:
    """What the reader and the extraction counted: files, bytes and skipped records by source, and faults by kind."""
    read: Numbers = {}
    problems: Counter[str] = Counter()
    for name, counts, _ in steps:
        if name.startswith("meter: "):
            continue
        for label, count in sorted(counts.items()):
            what, _, rest = label.partition("|")
            source, _, detail = rest.partition("|")
            if what == "problem":
                problems[detail] += int(count)
            elif what in ("files", "bytes", "skipped", "encoding"):
                row = read.setdefault(source, {"files": 0, "bytes": 0, "skipped": {}, "encoding": {}})
                if detail:
                    row[what][detail] = row[what].get(detail, 0) + int(count)
                else:
                    row[what] += int(count)
    return read, dict(problems.most_common())


def _tokenization(steps: list[tuple[str, Counter[str], float]]) -> Numbers:
    for name, counts, seconds in steps:
        if name.endswith("tokenization"):
            tokens = int(counts["tokens"])
            return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if seconds else 0.0}
    return {}


def _lengths(counts: Counter[str]) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for label, count in counts.items():
        if label.startswith("length|"):
            _, language, power = label.split("|")
            found.setdefault(language, {})[int(power)] = int(count)
    return {language: dict(sorted(row.items())) for language, row in sorted(found.items())}


def _lines(files: list[Path]) -> list[Numbers]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]


def _examples(folder: Path) -> list[Numbers]:
    """The first examples of each reason, over all shards."""
    found: dict[str, list[Numbers]] = {}
    for example in _lines(sorted(folder.glob("*.jsonl"))):
        chosen = found.setdefault(example["reason"], [])
        if len(chosen) < EXAMPLES:
            chosen.append(example)
    return [example for _, chosen in sorted(found.items()) for example in chosen]


def _clusters(layout: Layout) -> list[Numbers]:
    """Some clusters: the document that was kept and some that were dropped for it."""
    dropped: dict[int, list[Numbers]] = {}
    for example in _lines(sorted((layout.examples / "minhash").glob("*.jsonl"))):
        dropped.setdefault(example["minhash_cluster_id"], []).append(example)
    kept = {example["minhash_cluster_id"]: example for example in _lines(sorted(layout.clusters.glob("*.jsonl")))}
    both: list[Numbers] = [
        {"kept": kept[number], "dropped": dropped[number]} for number in sorted(dropped) if number in kept
    ]
    return sorted(both, key=lambda pair: -pair["kept"]["minhash_cluster_size"])[:CLUSTERS]


def _contamination(layout: Layout) -> Numbers:
    file = layout.contamination / "counts.json"
    return json.loads(file.read_text()) if file.exists() else {}
