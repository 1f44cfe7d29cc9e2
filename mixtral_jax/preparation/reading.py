"""The steps that begin a pipeline: the files of a shard, or the documents that an earlier stage wrote."""

import time
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader

from mixtral_jax.preparation.config import PrepareConfig
from mixtral_jax.preparation.examples import NAMED, FirstCases, note_problem
from mixtral_jax.preparation.file_readers import read_documents
from mixtral_jax.preparation.plan import InputFile, load_shards

HEARTBEAT = 1.0  # seconds between two words of how far a task is


class ShardReader(PipelineStep):
    """Reads the files of the task's shard; what cannot be read is counted and named, and nothing else is lost."""

    type = "📖 - READER"
    name = "read"

    def __init__(self, config: PrepareConfig, folder: Path):
        """Names the folder below which problems and progress are written."""
        super().__init__()
        self._config = config
        self._folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the documents of shard `rank`."""
        shard = load_shards(self._config)[rank]
        progress = _Heartbeat(self._folder / "progress" / f"{rank:05d}")
        with FirstCases(self._folder / "problems" / f"{rank:05d}.jsonl", NAMED) as problems:
            for file in shard.files:
                yield from self._read(file, shard.source, problems, progress)
                progress.finished(file.size or 0)
                self.stat_update(f"files|{shard.source}")
                self.stat_update(f"bytes|{shard.source}", value=file.size or 0)
            progress.close()
        for kind, count in problems.counts.items():
            self.stat_update(f"problem|{shard.source}|{kind}", value=count)

    def _read(
        self, file: InputFile, source_name: str, problems: FirstCases, progress: "_Heartbeat"
    ) -> Iterator[Document]:
        source = next(source for source in self._config.sources if source.name == source_name)
        limit = self._config.extraction.max_megabytes << 20

        def report(kind: str, record: object, detail: object) -> None:
            if kind.startswith("skipped"):
                self.stat_update(f"skipped|{source.name}|{kind.removeprefix('skipped: ')}")
            else:
                note_problem(problems, kind, f"{source.name}: {file.name} {record}".strip(), detail)

        documents = read_documents(file, source, limit, report, progress.within)
        while True:
            with self.track_time():
                raw = next(documents, None)
            if raw is None:
                return
            self.stat_update(f"encoding|{source.name}|{raw['encoding']}")
            if not raw["text"].strip():
                report("skipped: no text", raw["index"], "")
                continue
            metadata = {
                "source": source.name,
                "language": source.language,
                "curated": source.curated,
                "html": bool(raw.get("html")),
                "url": raw.get("url") or "",
                "date": raw.get("date") or "",
            }
            yield Document(
                text=raw["text"], id=raw.get("id") or f"{source.name}/{file.name}/{raw['index']}", metadata=metadata
            )


class StageReader(JsonlReader):
    """Reads what the task of the same number wrote in an earlier stage; it may have written nothing."""

    def __init__(self, folder: Path):
        """Names the folder of that stage's documents."""
        super().__init__(str(folder), compression="zstd", add_file_path=False)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the documents of task `rank`."""
        file = f"{rank:05d}.jsonl.zst"
        if self.data_folder.isfile(file):
            yield from self.read_file(file)


class _Heartbeat:
    """Writes now and then how many bytes a task has read, for the display."""

    def __init__(self, file: Path):
        self._file = file
        self._before = 0
        self._last = 0.0
        file.parent.mkdir(parents=True, exist_ok=True)

    def within(self, position: int) -> None:
        now = time.monotonic()
        if now - self._last > HEARTBEAT:
            self._last = now
            self._file.write_text(str(self._before + position))

    def finished(self, size: int) -> None:
        self._before += size

    def close(self) -> None:
        self._file.write_text(str(self._before))
