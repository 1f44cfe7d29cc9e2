"""The report as one page of HTML that opens without a network: tables, plots as SVG, examples."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; max-width: 900px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dbe3; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid #e6eaf0; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; } th { font-weight: 600; }
svg { width: 100%; height: auto; font-size: 12px; } svg text { fill: #1d2430; }
.legend span { margin-right: 1rem; } .legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
.big b { font-size: 1.5rem; display: block; } .big span { display: inline-block; margin-right: 2.5rem; }
details { margin: .4rem 0; } summary { cursor: pointer; }
blockquote { margin: .3rem 0 .8rem; padding: .3rem .8rem; border-left: 3px solid #c3ccd8; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; max-height: 11rem; overflow: auto; }
.note { color: #5a6575; font-size: 13px; overflow-wrap: anywhere; }
"""
COLORS = ("#3b6fb6", "#d9803b", "#4f9d69", "#b5485d", "#7d63ab", "#8a6d4b", "#4aa5b5", "#9a9a3b")
WIDTH, ROW, LABEL, VALUE = 860, 26, 210, 150  # of a plot, of one of its bars, and beside them, in its own units
Numbers = dict[str, Any]


def make_page(report: Numbers) -> str:
    """Renders the whole page.

    Args:
        report: what `report.json` holds.

    Returns:
        HTML that refers to nothing outside of itself.
    """
    sections = [
        ("Through the steps", _steps(report)),
        ("Languages", _languages(report)),
        ("Sources", _sources(report)),
        ("Lengths of documents", _lengths(report)),
        ("What each step dropped", _dropped(report)),
        ("Duplicates", _duplicates(report)),
        ("Decontamination", _contamination(report)),
        ("What could not be read", _problems(report)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Preparation report</title>'
        f"<style>{STYLE}</style></head><body><h1>Preparation report</h1>{_summary(report)}{body}</body></html>\n"
    )


def _summary(report: Numbers) -> str:
    total, read = report["total"], report["input"]
    size = sum(row["bytes"] for row in read.values()) / 1e6
    facts = [
        (f"{sum(row['files'] for row in read.values()):,}", f"files, {size:,.1f} MB"),
        (f"{report['steps'][0]['out']['documents']:,}", "documents read"),
        (f"{total['documents']:,}", "documents kept"),
        (f"{total['tokens']:,}", "tokens"),
        (f"{report['tokenization'].get('tokens_per_second', 0):,.0f}", "tokens/s and core, tokenization"),
    ]
    return '<p class="big">' + "".join(f"<span><b>{value}</b>{escape(name)}</span>" for value, name in facts) + "</p>"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def cells(tag: str, values: Iterable[object]) -> str:
        return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _bars(rows: Sequence[tuple[str, Mapping[str, int]]], unit: str) -> str:
    """Draws one horizontal bar a row, parted by series.

    Args:
        rows: label, and the value of each series.
        unit: what the numbers count, written behind each row's sum.

    Returns:
        An SVG element with its legend.
    """
    names = sorted({name for _, series in rows for name in series})
    color = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    most = max((sum(series.values()) for _, series in rows), default=0) or 1
    parts: list[str] = []
    for number, (label, series) in enumerate(rows):
        x, y = float(LABEL), number * ROW
        parts.append(f'<text x="{LABEL - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        for name in names:
            width = (WIDTH - LABEL - VALUE) * series.get(name, 0) / most
            title = f"<title>{escape(name)}: {series.get(name, 0):,.0f} {unit}</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{ROW - 8}" fill="{color[name]}">'
                f"{title}</rect>"
            )
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 17}">{sum(series.values()):,.0f} {unit}</text>')
    drawn = f'<svg viewBox="0 0 {WIDTH} {len(rows) * ROW}" role="img">{"".join(parts)}</svg>'
    if len(names) < 2:
        return drawn
    items = (f'<span><i style="background:{color[name]}"></i>{escape(name)}</span>' for name in names)
    return f'{drawn}<p class="legend">{"".join(items)}</p>'


def _steps(report: Numbers) -> str:
    rows = []
    for step in report["steps"]:
        share = step["dropped"] / max(1, step["in"]["documents"])
        speed = step.get("bytes_per_second")
        numbers = [f"{step[side][unit]:,}" for unit in ("characters", "tokens") for side in ("in", "out")]
        documents = [f"{step['in']['documents']:,}", f"{step['out']['documents']:,}", f"{share:.1%}"]
        rows.append([step["step"], *documents, *numbers, f"{speed / 1e6:.2f}" if speed else ""])
    head = ["step", "documents in", "out", "dropped", "characters in", "out", "tokens in", "out", "MB/s and core"]
    bars = _bars(
        [
            (step["step"], {name: row["documents"] for name, row in step["groups"]["sources"].items()})
            for step in report["steps"]
        ],
        "documents",
    )
    return bars + _table(head, rows) + _by_group(report, "languages") + _by_group(report, "sources")


def _by_group(report: Numbers, kind: str) -> str:
    """Documents, characters and tokens out of each step for each language or source, folded away."""
    parts = []
    for unit in ("documents", "characters", "tokens"):
        names = sorted({name for step in report["steps"] for name in step["groups"][kind]})
        rows = [
            [step["step"], *(f"{step['groups'][kind].get(name, {}).get(unit, 0):,}" for name in names)]
            for step in report["steps"]
        ]
        parts.append(_table([f"{unit} out of", *("not known yet" if name == "-" else name for name in names)], rows))
    return f"<details><summary>by {kind}</summary>{''.join(parts)}</details>"


def _languages(report: Numbers) -> str:
    rows = [
        [name, f"{row['documents']:,}", f"{row['characters']:,}", f"{row['tokens']:,}", f"{row['weight']:.1%}"]
        for name, row in report["languages"].items()
    ]
    bars = _bars([(name, {"tokens": row["tokens"]}) for name, row in report["languages"].items()], "tokens")
    head = ["language", "documents", "characters", "tokens", f"weight at temperature {report['temperature']:g}"]
    return bars + _table(head, rows)


def _sources(report: Numbers) -> str:
    last = report["steps"][-1]["groups"]["sources"]
    rows = []
    for name, row in report["input"].items():
        kept = last.get(name, {"documents": 0, "tokens": 0})
        first = report["steps"][0]["groups"]["sources"].get(name, {"documents": 0})
        rows.append([
            name, f"{row['files']:,}", f"{row['bytes'] / 1e6:,.2f}", f"{first['documents']:,}",
            f"{kept['documents']:,}", f"{kept['tokens']:,}", _counts(row["encoding"]), _counts(row["skipped"]),
            _counts(row["left_out"]),
        ])  # fmt: skip
    head = ["source", "files", "MB", "documents read", "kept", "tokens kept", "encoding by", "records passed over"]
    return _table([*head, "files left out"], rows)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _lengths(report: Numbers) -> str:
    powers = sorted({int(power) for row in report["lengths"].values() for power in row})
    rows = [
        (
            f"{_short(2**power)} characters or more",
            {language: row.get(power, row.get(str(power), 0)) for language, row in report["lengths"].items()},
        )
        for power in (range(powers[0], powers[-1] + 1) if powers else ())
    ]
    return _bars(rows, "documents") if rows else ""


def _short(number: int) -> str:
    return f"{number >> 20}M" if number >= 1 << 20 else f"{number >> 10}k" if number >= 1 << 10 else str(number)


def _quote(example: Numbers) -> str:
    facts = (example.get("source"), example.get("language"), example.get("url") or example["id"])
    return f'<div class="note">{escape(" · ".join(str(fact) for fact in facts if fact))}</div>' + (
        f"<blockquote>{escape(example['text'])}</blockquote>"
    )


def _dropped(report: Numbers) -> str:
    parts = []
    for step in report["steps"]:
        reasons = step.get("reasons", {})
        examples = report["examples"].get(step["step"], [])
        if not step["dropped"]:
            continue
        if reasons:
            parts.append(f"<h3>{escape(step['step'])}</h3>")
            parts.append(_bars([(name, {"dropped": count}) for name, count in reasons.items()], "documents"))
        elif examples:
            parts.append(f"<h3>{escape(step['step'])}</h3>")
        for reason in dict.fromkeys(example["reason"] for example in examples):
            quotes = "".join(_quote(example) for example in examples if example["reason"] == reason)
            parts.append(f"<details><summary>examples: {escape(reason)}</summary>{quotes}</details>")
    return "".join(parts)


def _duplicates(report: Numbers) -> str:
    clusters = report["clusters"]
    if not clusters["sizes"]:
        return "<p>No clusters of similar documents were found.</p>"
    counts: Counter[int] = Counter()  # by the power of two
    for size, count in clusters["sizes"].items():
        counts[int(size).bit_length() - 1] += count
    rows = [
        (f"{2**power} to {2 ** (power + 1) - 1} documents", {"clusters": counts[power]}) for power in sorted(counts)
    ]
    parts = [_bars(rows, "clusters")]
    for pair in clusters["shown"]:
        size = pair["kept"]["minhash_cluster_size"]
        inner = "<b>kept</b>" + _quote(pair["kept"]) + "<b>dropped</b>" + "".join(map(_quote, pair["dropped"]))
        parts.append(f"<details><summary>a cluster of {size}</summary>{inner}</details>")
    return "".join(parts)


def _contamination(report: Numbers) -> str:
    rows = [[name, f"{count['texts']:,}", f"{count['too_short']:,}"] for name, count in report["contamination"].items()]
    head = ["evaluation file", "texts", "of these too short to be protected"]
    return _table(head, rows) if rows else ""


def _problems(report: Numbers) -> str:
    problems = report["problems"]
    if not problems["counts"]:
        return "<p>Everything could be read.</p>"
    bars = _bars([(kind, {"cases": count}) for kind, count in problems["counts"].items()], "cases")
    rows = [[line["where"], line["kind"], line["detail"]] for line in problems["named"]]
    return bars + f"<details><summary>the first {len(rows)}</summary>{_table(['where', 'what', ''], rows)}</details>"
