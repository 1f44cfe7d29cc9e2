"""HTML to readable text, each page in a process of its own kind that may fail without harm."""

from collections.abc import Callable
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors.base import ExtractorSandbox

from mixtral_jax.config import UserError
from mixtral_jax.preparation.config import ExtractionConfig
from mixtral_jax.preparation.examples import NAMED, FirstCases, note_problem


def extract_resiliparse(html: str) -> str:
    """Main text of a page by Resiliparse."""
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(html, main_content=True, alt_texts=False)


def extract_trafilatura(html: str) -> str:
    """Main text of a page by Trafilatura; its memory of earlier pages is off, so a page gives the same text always."""
    from trafilatura import extract

    return extract(html, favor_precision=True, include_comments=False, deduplicate=False) or ""


EXTRACTORS: dict[str, Callable[[str], str]] = {"resiliparse": extract_resiliparse, "trafilatura": extract_trafilatura}


def check_extractor(name: str) -> None:
    """Raises `UserError` when an extractor is not fully installed; else every page would fail in its process."""
    try:
        EXTRACTORS[name](f"<html><body><article><p>{'A sentence. ' * 20}</p></article></body></html>")
    except ImportError as error:
        raise UserError(f"extraction.extractor={name} cannot start ({error}): install the extra 'prepare'") from None


class Extraction(PipelineStep):
    """Replaces HTML by its text; plain documents pass. Pages that fail are counted and named."""

    type = "🛢 - EXTRAC"
    name = "extraction"

    def __init__(self, config: ExtractionConfig, folder: Path):
        """Names the folder below which problems are written."""
        super().__init__()
        self._config = config
        self._folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the documents that have text."""
        extract = EXTRACTORS[self._config.extractor]
        with (
            FirstCases(self._folder / "problems" / f"{rank:05d}.extraction.jsonl", NAMED) as problems,
            ExtractorSandbox(timeout=self._config.timeout) as sandbox,
        ):
            for document in data:
                if document.metadata.pop("html"):
                    source = document.metadata["source"]
                    self.stat_update("handled", value=len(document.text.encode()))
                    with self.track_time():
                        try:
                            text = sandbox.process_document(document.text, extract)
                            document.text = text.encode("utf-8", "replace").decode().strip()
                        except Exception as error:  # a time-out, a dead process, or whatever the extractor raises
                            kind = "time-out" if isinstance(error, TimeoutError) else "failed extraction"
                            where = document.metadata["url"] or document.id
                            note_problem(problems, kind, f"{source}: {where}", f"{type(error).__name__}: {error}")
                            continue
                    if not document.text:
                        self.stat_update(f"skipped|{source}|nothing extracted")
                        continue
                yield document
        for kind, count in problems.counts.items():
            self.stat_update(f"problem|-|{kind}", value=count)
