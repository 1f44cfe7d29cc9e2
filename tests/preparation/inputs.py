"""Small inputs in every format, and runs of `prepare` over them."""

import functools
import gzip
import hashlib
import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import sentencepiece
from rich.console import Console
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from mixtral_jax.preparation.config import PrepareConfig, load_prepare_config
from mixtral_jax.preparation.running import prepare

# No document is compared with others: half of the stages.
ALONE = ("exact_dedup.enabled=false", "minhash.enabled=false")
WORDS = {
    "en": "the be to of and that have with from which their would people house water never through morning thought "
    "something under weather letters knowing should friend village children another street evening between",
    "fr": "le la les de et que est dans une pour avec maison jamais enfants femme chose monde jour rien autre "
    "pendant moment tête depuis encore peut-être beaucoup derrière fenêtre travail après même où était",
    "de": "der die das und ist zu den mit von nicht eine haben wieder Kinder Mutter Straße zwischen heute während "
    "Menschen nichts schön große Wasser gegen Fenster müssen Abend wissen kleine Geschichte werden",
    "es": "el la los de que y en una por con siempre nunca mujer hombre tiempo casa también después mientras ciudad "
    "años noche muchas pueblo todavía había estaba palabras hacia entonces corazón hijos mañana",
    "it": "il la di che e un per non con della sempre casa tempo donna uomo anche quando della città ancora niente "
    "giorno notte perché bambini molto parole verso allora cuore figli dopo prima questa vecchia aveva",
}


def prose(language: str, seed: int, sentences: int = 12) -> str:
    """Text in a language that passes the rules: some lines of sentences of common words in any order."""
    draw = random.Random(f"{language} {seed}")
    words = WORDS[language].split()
    found = [" ".join(draw.choices(words, k=draw.randint(9, 16))).capitalize() + "." for _ in range(sentences)]
    return "\n".join(" ".join(found[place : place + 4]) for place in range(0, sentences, 4))


def html(text: str) -> str:
    paragraphs = "".join(f"<p>{line}</p>" for line in text.split("\n"))
    return (
        '<!DOCTYPE html><html><head><meta charset="utf-8"><title>Page</title></head><body><nav>Home</nav>'
        f"<article><h1>A story</h1>{paragraphs}</article></body></html>"
    )


def warc_members(pages: list[tuple[str, str]], *, wet: bool = False, gzipped: bool = True) -> list[bytes]:
    """One chunk of bytes for each record of (url, content)."""
    members = []
    for number, (url, content) in enumerate(pages):
        out = io.BytesIO()
        writer = WARCWriter(out, gzip=gzipped)
        headers = {
            "WARC-Record-ID": f"<urn:uuid:00000000-0000-0000-0000-{number:012}>",
            "WARC-Date": "2024-01-01T00:00:00Z",
        }
        if wet:
            record = writer.create_warc_record(
                url, "conversion", io.BytesIO(content.encode()), warc_content_type="text/plain",
                warc_headers_dict=headers | {"WARC-Identified-Payload-Type": "text/plain"},
            )  # fmt: skip
        else:
            answer = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
            record = writer.create_warc_record(
                url, "response", io.BytesIO(content.encode()), http_headers=answer, warc_headers_dict=headers
            )
        writer.write_record(record)
        members.append(out.getvalue())
    return members


@functools.cache
def tokenizer_bytes() -> bytes:
    """A tokenizer of a few hundred pieces."""
    text = [line for language in WORDS for seed in range(20) for line in prose(language, seed).split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=600, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def config_for(folder: Path, sources: str, *overrides: str, output: str = "out") -> PrepareConfig:
    """A configuration whose sources are given in YAML; paths are below the folder."""
    file = folder / "prepare.yaml"
    file.write_text(
        f"output: {folder / output}\ntokenizer: {folder / 'tiny.model'}\nwords: regex\n"
        f"url_filter: {{bundled_lists: false}}\nexecutor: {{workers: 1}}\nsources:\n{sources}"
    )
    if not (folder / "tiny.model").exists():
        (folder / "tiny.model").write_bytes(tokenizer_bytes())
    return load_prepare_config(file, list(overrides))


def run(config: PrepareConfig) -> None:
    prepare(config, Console(quiet=True))


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of every file that a preparation is for."""
    files = sorted(file for part in ("documents", "tokens") for file in (output / part).rglob("*") if file.is_file())
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_mixture(folder: Path) -> str:
    """Inputs in every format with duplicates and things to drop; gives the sources in YAML."""
    pages = [(f"http://{language}.example.net/{n}", html(prose(language, n))) for language in WORDS for n in range(4)]
    (folder / "crawl").mkdir()
    for part in range(3):
        (folder / "crawl" / f"{part}.warc.gz").write_bytes(b"".join(warc_members(pages[part::3])))
    wet = [(f"http://wet.example.org/{n}", prose("fr", 100 + n)) for n in range(3)]
    (folder / "crawl" / "a.warc.wet.gz").write_bytes(b"".join(warc_members(wet, wet=True)))
    (folder / "html").mkdir()
    for number in range(4):
        (folder / "html" / f"{number}.html").write_text(html(prose("de", 200 + number)))
    same = prose("en", 300, 40)
    near = same.replace("evening", "night", 1)
    private = prose("en", 301) + "\nPlease write to jane.doe@private.org and to 8.8.4.4 about the town."
    records = [same, same, near, private, *(prose("it", 400 + n) for n in range(5)), "too short", "buy buy " * 200]
    with gzip.open(folder / "records.jsonl.gz", "wt") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in records)
    pyarrow.parquet.write_table(pyarrow.table({"text": [prose("es", 500 + n) for n in range(4)]}), folder / "t.parquet")
    (folder / "lines.txt").write_text("\n".join(prose("en", 600 + n).replace("\n", " ") for n in range(5)))
    return f"""
  - {{name: crawl, path: "{folder}/crawl"}}
  - {{name: html, path: "{folder}/html"}}
  - {{name: records, path: "{folder}/records.jsonl.gz"}}
  - {{name: table, path: "{folder}/t.parquet"}}
  - {{name: lines, path: "{folder}/lines.txt", lines: true, curated: true}}
"""
