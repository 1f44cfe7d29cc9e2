"""Pages in many languages and encodings, and records of WARC files that hold what is wanted."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from mixtral_jax.preparation.config import PrepareSource
from mixtral_jax.preparation.file_readers import read_documents
from mixtral_jax.preparation.plan import InputFile

# By language: a text, and labels of encodings in which pages of it were written.
TEXTS = {
    language: (entry["text"], entry["encodings"])
    for language, entry in json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8")).items()
}


def page(text: str, head: str = "") -> str:
    return f"<!DOCTYPE html><html><head>{head}<title>{text[:9]}</title></head><body><p>{text}</p></body></html>"


def record(
    body: bytes, number: int = 0, content_type: str = "text/html", payload: str | None = None, **headers: str
) -> bytes:
    """One record of an answer by HTTP, not compressed; headers are written with _ for -."""
    named = {
        "WARC-Record-ID": f"<urn:uuid:00000000-0000-0000-0000-{number:012}>",
        "WARC-Date": "2024-01-01T00:00:00Z",
    }
    if payload is not None:
        named["WARC-Identified-Payload-Type"] = payload
    sent = [("Content-Type", content_type), *((name.replace("_", "-"), value) for name, value in headers.items())]
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    answer = StatusAndHeaders("200 OK", sent, protocol="HTTP/1.1")
    address = f"http://example.com/{number}"
    writer.write_record(
        writer.create_warc_record(address, "response", io.BytesIO(body), http_headers=answer, warc_headers_dict=named)
    )
    return out.getvalue()


def archive(*bodies: bytes, **settings: str) -> bytes:
    return b"".join(gzip.compress(record(body, number, **settings)) for number, body in enumerate(bodies))


def read(
    folder: Path, data: bytes, name: str = "a.warc.gz", limit: int = 1 << 20, **source: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """The documents of a file, and the kinds of its problems."""
    file = folder / name
    file.write_bytes(data)
    problems: list[str] = []
    documents = read_documents(
        InputFile(str(file), name, len(data), ""),
        PrepareSource(name="a", path=str(file), **source),
        limit,
        lambda kind, *_: problems.append(kind),
        lambda _: None,
    )
    return list(documents), problems
