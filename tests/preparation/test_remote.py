"""Sources in stores that fsspec opens: a web server on this machine, and its own store in memory."""

import functools
import gzip
import http.server
import io
import json
import threading
from pathlib import Path

import fsspec
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.preparation.config import PrepareSource
from mixtral_jax.preparation.file_readers import read_documents
from mixtral_jax.preparation.plan import InputFile
from tests.preparation.inputs import ALONE, WORDS, config_for, digests, html, prose, run, warc_members

OF_KINDS = ("pages.warc.gz", "texts.warc.wet.gz", "records.jsonl.gz")


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; breaks the connection in the middle of the files named in `broken`."""

    broken: frozenset[str] = frozenset()

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        if self.path.lstrip("/") in type(self).broken:
            content = content[: len(content) // 2]
            self.close_connection = True
        outputfile.write(content)


def write_served(folder: Path) -> Path:
    folder.mkdir()
    pages = [(f"http://{language}.example.net/", html(prose(language, 1))) for language in WORDS]
    texts = [(f"http://wet.example.org/{n}", prose("fr", 100 + n)) for n in range(3)]
    (folder / "pages.warc.gz").write_bytes(b"".join(warc_members(pages)))
    (folder / "texts.warc.wet.gz").write_bytes(b"".join(warc_members(texts, wet=True)))
    lines = "".join(json.dumps({"text": prose("it", 400 + n)}) + "\n" for n in range(5)).encode()
    (folder / "records.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What local files give."""
    folder = tmp_path_factory.mktemp("local")
    run(config_for(folder, sources_at(str(write_served(folder / "served"))), *ALONE))
    return digests(folder / "out")


@pytest.fixture
def address(tmp_path):
    folder = write_served(tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def sources_at(place: str) -> str:
    named = "".join(f'  - {{name: s{n}, path: "{place}/{name}"}}\n' for n, name in enumerate(OF_KINDS))
    return named + f'  - {{name: glob, path: "{place}/*.warc.gz"}}\n'


def report_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "report.json").read_text())


def test_a_web_server_and_memory_give_what_local_files_give(tmp_path, address, expected):
    assert len(expected) > 10
    run(config_for(tmp_path, sources_at(address), *ALONE))
    assert digests(tmp_path / "out") == expected
    assert report_of(tmp_path)["problems"]["counts"] == {}
    plan = json.loads((tmp_path / "out" / "work" / "plan.json").read_text())
    sizes = [file["size"] for shard in plan["shards"] for file in shard["files"]]
    assert sizes == [(tmp_path / "served" / name).stat().st_size for name in (*OF_KINDS, OF_KINDS[0])]
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "served").iterdir():
        memory.pipe(f"/bucket/{file.name}", file.read_bytes())
    run(config_for(tmp_path, sources_at("memory://bucket"), *ALONE, output="memory"))
    assert digests(tmp_path / "memory") == expected


def test_a_connection_that_breaks_loses_no_document(tmp_path, address, expected, monkeypatch):
    monkeypatch.setattr(Server, "broken", frozenset({"texts.warc.wet.gz"}))
    config = config_for(tmp_path, sources_at(address), *ALONE)
    with pytest.raises(UserError, match=r"the stage pages failed .* run the same command to go on"):
        run(config)
    assert not (tmp_path / "out" / "documents").exists()
    monkeypatch.setattr(Server, "broken", frozenset())
    run(config)
    assert digests(tmp_path / "out") == expected


def test_a_file_cut_short_in_the_store_is_a_bad_file(tmp_path, address):
    file = tmp_path / "served" / "pages.warc.gz"
    file.write_bytes(file.read_bytes()[:-30])
    (tmp_path / "served" / "records.jsonl.gz").write_bytes(b"this is no gzip")
    run(config_for(tmp_path, sources_at(address), *ALONE))
    assert report_of(tmp_path)["problems"]["counts"] == {"truncated gzip": 2, "bad record": 1}  # by its bytes, a line


def test_what_is_not_there_is_one_sentence(tmp_path, address):
    for path in (
        f"{address}/none.warc.gz",
        f"{address}/none*.gz",
        "memory://none/a.jsonl",
        "http://127.0.0.1:9/a.html",
    ):
        with pytest.raises(UserError, match=r"source 'a': (cannot find|nothing to read at) "):
            run(config_for(tmp_path, f'  - {{name: a, path: "{path}"}}\n'))


@pytest.mark.parametrize("kind", [".jsonl", ".warc.gz", ".parquet", ".txt"])
def test_only_a_remote_store_may_fail(monkeypatch, kind):
    class Broken(io.RawIOBase):
        def readable(self):
            return True

        def seekable(self):
            return kind == ".parquet"

        def seek(self, place, whence=0):
            return 99

        def tell(self):
            return 99

        def readinto(self, buffer):
            raise ConnectionResetError("connection reset by peer")

        def read(self, size=-1):
            raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(fsspec, "open", lambda *_: Broken())

    def read(place):
        file, told = InputFile(place + kind, "a" + kind, 99, ""), []
        source = PrepareSource(name="a", path=place)
        assert not list(read_documents(file, source, 1 << 20, lambda *what: told.append(what), lambda _: None))
        return told

    [(problem, _, detail)] = read("/disk/a")
    assert (problem, detail) == ("unreadable file", "ConnectionResetError: connection reset by peer")
    with pytest.raises(ConnectionResetError):
        read("s3://bucket/a")
