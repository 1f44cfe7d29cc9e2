"""What was wrong with the input: every case is counted, the first ones of a shard are named."""

import json
from pathlib import Path
from types import TracebackType

NAMED = 100  # of a shard; the rest is only counted


class ProblemLog:
    """Collects problems of one task; on leaving it as a context, the file is written."""

    def __init__(self, file: Path):
        """Names the file, one JSON object a line: `kind`, `where` and `detail`."""
        self._file = file
        self._lines: list[str] = []
        self.counts: dict[str, int] = {}

    def note(self, kind: str, where: str, detail: object = "") -> None:
        """Adds a case.

        Args:
            kind: a few words that other cases share.
            where: file and record.
            detail: what was found, in a sentence at most.
        """
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self._lines) < NAMED:
            text = " ".join(str(detail).split())[:200]
            line = json.dumps({"kind": kind, "where": where, "detail": text}, ensure_ascii=False)
            self._lines.append(line.encode("utf-8", "replace").decode())

    def __enter__(self) -> "ProblemLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(line + "\n" for line in self._lines), encoding="utf-8")
