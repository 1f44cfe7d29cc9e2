"""What the report shows of a task's work: counts of each kind of case, and the first cases of each, told as JSON lines.

Kinds are problems of the input, reasons to drop a document, and clusters of similar ones.
"""

import json
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from mixtral_jax.preparation.masking import Masking

NAMED = 100  # problems of a kind
DROPPED = 3  # documents of a reason
KEPT = 20  # documents that stand for a cluster
SHOWN = 600  # characters of a document


class FirstCases(AbstractContextManager["FirstCases"]):
    """Counts the cases of one task by their kind; on leaving it as a context, the first of each kind are written."""

    def __init__(self, file: Path, each: int):
        """Names the file, one JSON object a line, and how many cases of a kind are written."""
        self.file = file
        self.counts: Counter[str] = Counter()
        self._each = each
        self._lines: list[str] = []

    def count(self, kind: str) -> bool:
        """Counts a case, and says whether it is one to write."""
        self.counts[kind] += 1
        return self.counts[kind] <= self._each

    def keep(self, case: dict[str, object]) -> None:
        """Takes a case to write."""
        line = json.dumps(case, ensure_ascii=False) + "\n"
        self._lines.append(line.encode("utf-8", "replace").decode())

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("".join(self._lines), encoding="utf-8")


def note_problem(cases: FirstCases, kind: str, where: str, detail: object = "") -> None:
    """Adds a case of what was wrong with the input.

    Args:
        cases: takes it, with `kind`, `where` and `detail`.
        kind: a few words that other cases share.
        where: file and record.
        detail: what was found, in a sentence at most.
    """
    if cases.count(kind):
        cases.keep({"kind": kind, "where": where, "detail": " ".join(str(detail).split())[:200]})


class Examples(FirstCases):
    """Stands in for a writer of dropped documents in datatrove's filters."""

    def __init__(self, folder: Path, reason: str = "dropped"):
        """Names the folder of the step, and the reason where the step gives none."""
        super().__init__(folder, DROPPED)
        self._folder = folder
        self._reason = reason

    def write(self, document: Document, rank: int = 0) -> None:
        """Takes a dropped document."""
        self.file = self._folder / f"{rank:05d}.jsonl"
        reason = document.metadata.get("filter_reason") or self._reason
        if self.count(reason):
            self.keep(describe(document) | {"reason": reason})


class ClusterExamples(PipelineStep):
    """Lets documents through and notes some that stand for a cluster of similar ones."""

    type = "examples"
    name = "clusters"

    def __init__(self, folder: Path):
        """Names where to write."""
        super().__init__()
        self._folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the same documents."""
        with FirstCases(self._folder / f"{rank:05d}.jsonl", KEPT) as cases:
            for document in data:
                if document.metadata.get("minhash_cluster_id", -1) >= 0 and cases.count("kept"):
                    cases.keep(describe(document))
                yield document


def describe(document: Document) -> dict[str, object]:
    """What the report shows of a document; addresses of people and machines are masked."""
    text = Masking().format(document.text[:SHOWN])
    kept = ("source", "language", "url", "minhash_cluster_id", "minhash_cluster_size")
    return {"id": document.id, "text": text} | {key: document.metadata.get(key) for key in kept}


def cluster_sizes(folder: Path) -> dict[int, int]:
    """Counts clusters by their size, from what datatrove's clustering wrote (document and cluster, by shard)."""
    members: Counter[int] = Counter()
    for file in sorted(folder.glob("*.clusters")):
        members.update(np.fromfile(file, "<u4").reshape(-1, 2)[:, 1].tolist())
    return dict(sorted(Counter(members.values()).items()))
