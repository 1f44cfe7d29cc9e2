"""Clusters of similar documents, for the report: sizes of all, and the first documents that were kept of one."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from mixtral_jax.preparation.examples import describe

EACH = 20  # kept documents of a shard that are noted


class ClusterExamples(PipelineStep):
    """Lets documents through and notes some that stand for a cluster of similar ones."""

    type = "meter"
    name = "clusters"

    def __init__(self, folder: Path):
        """Names where to write."""
        super().__init__()
        self._folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the same documents."""
        lines: list[str] = []
        for document in data:
            if document.metadata.get("minhash_cluster_id", -1) >= 0 and len(lines) < EACH:
                lines.append(json.dumps(describe(document), ensure_ascii=False))
            yield document
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{rank:05d}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def cluster_sizes(folder: Path) -> dict[int, int]:
    """Counts clusters by their size, from what datatrove's clustering wrote (document and cluster, by shard)."""
    members: Counter[int] = Counter()
    for file in sorted(folder.glob("*.clusters")):
        members.update(np.fromfile(file, "<u4").reshape(-1, 2)[:, 1].tolist())
    return dict(sorted(Counter(members.values()).items()))
