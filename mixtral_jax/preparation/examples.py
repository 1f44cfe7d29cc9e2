"""Examples of what a step dropped, for the report: the first few of each reason in every shard."""

import json
from pathlib import Path
from types import TracebackType

from datatrove.data import Document

from mixtral_jax.preparation.masking import Masking

EACH = 3  # examples of a reason
SHOWN = 600  # characters


class Examples:
    """Stands in for a writer of dropped documents in datatrove's filters."""

    def __init__(self, folder: Path, reason: str = "dropped"):
        """Names the folder of the step, and the reason where the step gives none."""
        self._folder = folder
        self._reason = reason
        self._rank = 0
        self._found: dict[str, list[dict[str, object]]] = {}

    def __enter__(self) -> "Examples":
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        """Takes a dropped document."""
        self._rank = rank
        reason = document.metadata.get("filter_reason") or self._reason
        found = self._found.setdefault(reason, [])
        if len(found) < EACH:
            found.append(describe(document) | {"reason": reason})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._found:
            return
        lines = [json.dumps(example, ensure_ascii=False) for found in self._found.values() for example in found]
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{self._rank:05d}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def describe(document: Document) -> dict[str, object]:
    """What the report shows of a document; addresses of people and machines are masked."""
    text = Masking().format(document.text[:SHOWN])
    kept = ("source", "language", "url", "minhash_cluster_id", "minhash_cluster_size")
    return {"id": document.id, "text": text} | {key: document.metadata.get(key) for key in kept}
