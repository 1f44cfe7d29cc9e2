"""Speed of each step of the preparation on one core.

    python -m benchmarks.preparation "crawl/*.warc.gz" --megabytes 20

Pages are those of the files, over and over with other words in them until there are enough; without files they are made
of random words. Rates are bytes of the step's own input a second: HTML for reading and extraction, text for the rest.
"""

import argparse
import io
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.formatters import PIIFormatter
from loguru import logger
from rich.table import Table
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from mixtral_jax.console import make_console
from mixtral_jax.preparation.config import PrepareConfig, PrepareSource
from mixtral_jax.preparation.counting import shared_tokenizer
from mixtral_jax.preparation.examples import Examples
from mixtral_jax.preparation.extraction import EXTRACTORS
from mixtral_jax.preparation.file_readers import read_documents
from mixtral_jax.preparation.language import LanguageFilter
from mixtral_jax.preparation.plan import list_files
from mixtral_jax.preparation.rules import RULES, make_rule
from mixtral_jax.preparation.words import RegexWords

SECONDS = 3.0  # of each measurement


def rate(work: Callable[[], int]) -> float:
    """Repeats work that returns its bytes (or tokens) for some seconds; gives them per second of the processor's time.

    All of it runs in one thread, and the time of a processor does not count what else the machine does.
    """
    work()
    done, start = 0, time.process_time()
    while time.process_time() - start < SECONDS:
        done += work()
    return done / (time.process_time() - start)


def made_pages() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(5000)] + [
        "the",
        "and",
        "of",
    ] * 300
    pages = []
    for _ in range(100):
        body = "".join(
            f'<p class="text-{n}">{" ".join(draw.choices(words, k=60)).capitalize()}.</p><a href="/{n}">more</a>'
            for n in range(draw.randint(5, 40))
        )
        pages.append(f"<html><body><nav>menu</nav><article>{body}</article></body></html>")
    return pages


def pages_of(paths: list[str]) -> list[str]:
    """Pages of WARC files."""
    return [
        raw["text"]
        for path in paths
        for file in list_files(PrepareSource(name="x", path=path))
        for raw in read_documents(file, PrepareSource(name="x", path=path), 10 << 20, lambda *_: None, lambda _: None)
        if raw.get("html")
    ]


def varied(pages: list[str], size: int) -> list[str]:
    """Repeats pages up to so many bytes; a fifth of the longer words of their text are others of the same page."""
    draw, found, total = random.Random(0), [], 0
    while total < size:
        for page in pages:
            words = re.findall(r"\b[a-z]{4,}\b", re.sub(r"<[^>]*>", " ", page)) or ["word"]

            def other(word: re.Match[str], words: list[str] = words) -> str:
                return draw.choice(words) if draw.random() < 0.2 else word[0]

            found.append(re.sub(r">[^<]+<", lambda text: re.sub(r"\b[a-z]{4,}\b", other, text[0]), page))
            total += len(found[-1].encode())
    return found


def write_archive(pages: list[str], path: Path) -> None:
    """Writes pages as a WARC file, compressed by the record."""
    with open(path, "wb") as stream:
        writer = WARCWriter(stream, gzip=True)
        for number, page in enumerate(pages):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
            content = io.BytesIO(page.encode())
            url = f"http://example.org/{number}"
            writer.write_record(writer.create_warc_record(url, "response", content, http_headers=headers))


def documents(texts: list[str]) -> Iterator[Document]:
    for number, text in enumerate(texts):
        metadata = {"source": "x", "language": "en", "curated": False, "url": ""}
        yield Document(text=text, id=str(number), metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="WARC files or globs")
    parser.add_argument("--megabytes", type=float, default=20.0, help="of HTML to work on")
    options = parser.parse_args()
    logger.remove()
    table = Table(title="one core")
    table.add_column("step")
    table.add_column("MB/s of its input", justify="right")
    table.add_column("MB/s of HTML", justify="right")

    def add(name: str, work: Callable[[], int]) -> None:
        speed = rate(work) / 1e6
        of_html = speed * (size / size_of_text if name.endswith("(text)") else 1)
        table.add_row(name, f"{speed:.2f}", f"{of_html:.1f}")

    pages = varied(pages_of(options.files) if options.files else made_pages(), int(options.megabytes * 1e6))
    size = size_of_text = sum(len(page.encode()) for page in pages)
    with tempfile.TemporaryDirectory() as folder:
        write_archive(pages, Path(folder) / "pages.warc.gz")
        add("reading (HTML)", lambda: sum(len(page.encode()) for page in pages_of([f"{folder}/pages.warc.gz"])))
    texts: list[str] = []
    for name, extract in EXTRACTORS.items():
        add(f"extraction, {name} (HTML)", lambda extract=extract: len([extract(page) for page in pages]) and size)
    texts = [text for text in map(EXTRACTORS["resiliparse"], pages) if text.strip()]
    size_of_text = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        out = Examples(Path(folder))
        config = PrepareConfig(output=folder)
        language = LanguageFilter(config.language, out)

        def identify() -> int:
            for document in documents(texts):
                document.metadata["language"] = ""
                language.filter(document)
            return size_of_text

        add("language (text)", identify)
        for words in ("spacy", "regex"):
            settings = PrepareConfig(output=folder, words=words)  # type: ignore[arg-type]
            for name in RULES:
                rule = make_rule(name, settings, "en")
                # Distinct texts each time: datatrove remembers the words of the last few.
                add(
                    f"{name}, {words} (text)",
                    lambda rule=rule: sum(len(d.text.encode()) for d in documents(texts) if rule.filter(d) or True),
                )
        signatures = MinhashDedupSignature(f"{folder}/signatures", language=RegexWords())  # type: ignore[arg-type]

        def sign() -> int:
            signatures.run(documents(texts))
            return size_of_text

        add("MinHash signatures (text)", sign)
        mask = PIIFormatter()
        add("PII (text)", lambda: sum(len(text.encode()) for text in texts if mask.format(text)))
        tokenizer = shared_tokenizer("mixtral")
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        speed = rate(lambda: len(tokenizer.encode_batch(texts, threads=1)) and tokens)
        table.add_row("tokenization", f"{speed:,.0f} tokens/s", f"{speed / tokens * size / 1e6:.1f}")
    make_console().print(table)
    print(f"{len(pages)} pages, {size / 1e6:.2f} MB of HTML, {size_of_text / 1e6:.2f} MB of text")


if __name__ == "__main__":
    main()
