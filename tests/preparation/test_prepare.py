"""A preparation from files to token caches."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from datatrove.utils._import_utils import ASSETS_PATH

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.data.pipeline import TrainingData, open_documents
from mixtral_jax.data.sources import iter_documents
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.preparation import running
from mixtral_jax.preparation.config import LanguageConfig, UrlFilterConfig
from mixtral_jax.preparation.examples import Examples
from mixtral_jax.preparation.extraction import EXTRACTORS
from mixtral_jax.preparation.language import LanguageFilter
from mixtral_jax.preparation.url_filter import AddressFilter
from tests.preparation.inputs import ALONE, config_for, digests, html, prose, run, warc_members, write_mixture


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with inputs of every kind and the undisturbed preparation of them in `out`."""
    folder = tmp_path_factory.mktemp("prepare")
    sources = write_mixture(folder)
    run(config_for(folder, sources, "shard_megabytes=1"))
    return folder, sources, json.loads((folder / "out" / "report.json").read_text())


def documents(output: Path) -> list[dict]:
    records = []
    for file in sorted((output / "documents").rglob("*.zst")):
        reader = JsonlReader(str(file.parent), compression="zstd")
        records += [
            {"language": file.parent.name, "text": doc.text, "id": doc.id, **doc.metadata}
            for doc in reader.read_file(file.name)
        ]
    return records


def test_keeps_what_is_good_and_drops_what_is_not(prepared):
    folder, _, report = prepared
    found = documents(folder / "out")
    counts = {
        language: sum(doc["language"] == language for doc in found) for language in ("en", "fr", "de", "es", "it")
    }
    # crawl 4 each; wet 3 fr; html 4 de; records: 1 of 3 copies, 1 private, 5 it; table 4 es; lines 5 en
    assert counts == {"en": 4 + 2 + 5, "fr": 4 + 3, "de": 4 + 4, "es": 4 + 4, "it": 4 + 5}
    dropped = {step["step"]: step["dropped"] for step in report["steps"]}
    assert (dropped["exact_dedup"], dropped["minhash"]) == (1, 1)
    assert all(step["seconds"] > 0 for step in report["steps"] if step["dropped"])
    assert not any("buy buy" in doc["text"] or "too short" in doc["text"] for doc in found)
    assert len({doc["id"] for doc in found if doc["source"] != "crawl"}) == sum(
        doc["source"] != "crawl" for doc in found
    )


def test_masks_addresses_in_documents_and_in_the_report(prepared):
    folder, _, _ = prepared
    text = "".join(doc["text"] for doc in documents(folder / "out")) + (folder / "out" / "report.html").read_text()
    assert "jane.doe" not in text
    assert "8.8.4.4" not in text
    assert "@example." in text


def test_counts_agree_with_each_other_and_with_the_output(prepared):
    folder, _, report = prepared
    for before, after in zip(report["steps"], report["steps"][1:], strict=False):
        assert before["out"] == after["in"]
        assert after["dropped"] == after["in"]["documents"] - after["out"]["documents"] >= 0
        for kind in ("sources", "languages"):
            assert sum(row["documents"] for row in after["groups"][kind].values()) == after["out"]["documents"]
    for language, row in report["languages"].items():
        texts = [doc["text"] for doc in documents(folder / "out") if doc["language"] == language]
        assert row["documents"] == len(texts)
        assert row["characters"] == sum(map(len, texts))
        assert row["cache_tokens"] == row["tokens"] + 2 * len(texts)


def test_token_caches_hold_the_documents_in_order(prepared):
    folder, _, _ = prepared
    tokenizer = Tokenizer.from_file(folder / "tiny.model")
    for directory in sorted((folder / "out" / "tokens").iterdir()):
        texts = list(iter_documents(SourceConfig(name="x", path=str(folder / "out" / "documents" / directory.name))))
        wanted = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        assert np.fromfile(directory / "tokens", "<u2").tolist() == [token for ids in wanted for token in ids]
        assert np.fromfile(directory / "document_bytes", "<i8").tolist() == [len(text.encode()) for text in texts]


def training_config(folder: Path, **data: object):
    sources = [
        {"name": directory.name, "prepared": str(directory)} for directory in (folder / "out" / "tokens").iterdir()
    ]
    values = {"tokenizer": str(folder / "out" / "tokenizer.model"), "seq_len": 64, "sources": sources} | data
    model = "d_model: 8, d_ff: 8, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 4, vocab_size: 600, " + (
        "num_experts: 2, num_experts_per_tok: 1, rope_theta: 1e4, norm_eps: 1e-5"
    )
    return parse_config(f"model: {{{model}}}\ntrain: {{steps: 1, batch_size: 5}}\ndata: {json.dumps(values)}")


def test_training_takes_the_caches_as_sources_wherever_they_lie(prepared):
    folder, _, _ = prepared
    config = training_config(folder, holdout=0.1)
    _, training, held_out, _ = open_documents(config)
    data = TrainingData(config, training)
    assert sorted(data.source_names) == ["de", "en", "es", "fr", "it"]
    assert all(view.num_tokens for view in held_out)
    assert set(data.sources(0)[0]) == set(range(5))


def test_training_refuses_another_tokenizer(prepared):
    folder, _, _ = prepared
    config = training_config(folder, tokenizer="mixtral")
    config = parse_config(
        json.dumps({"model": dataclasses.asdict(config.model) | {"vocab_size": 32000},
                    "train": {"steps": 1, "batch_size": 5},
                    "data": {"tokenizer": "mixtral", "seq_len": 64,
                             "sources": [{"name": "en", "prepared": str(folder / "out" / "tokens" / "en")}]}})
    )  # fmt: skip
    with pytest.raises(UserError, match=r"tokens/en .*set data.tokenizer to the tokenizer.model of the preparation"):
        open_documents(config)


def test_training_a_tokenizer_asks_for_text(prepared):
    folder, _, _ = prepared
    with pytest.raises(UserError, match="prepared tokens, no text"):
        open_documents(training_config(folder, tokenizer="train"))


def test_any_number_of_workers_writes_the_same(prepared):
    folder, sources, _ = prepared
    run(config_for(folder, sources, "shard_megabytes=1", "executor.workers=3", output="out3"))
    assert digests(folder / "out3") == digests(folder / "out") != {}


KILLS = {
    "while pages are read": ("counting.Meter", "_tokens", 9),
    "while clusters are made": ("stages.MinhashDedupCluster", "run", 1),
    "while documents are written": ("writing.TokenWriter", "_write", 4),
    "while a cache is joined": ("writing", "write_index", 2),
}


@pytest.mark.drills
@pytest.mark.parametrize("place", KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(prepared, place):
    folder, sources, _ = prepared
    where, function, calls = KILLS[place]
    output = "killed-" + place.replace(" ", "-")
    config_for(folder, sources, output=output)
    script = f"""
import os, signal, sys
from mixtral_jax.preparation import {where.partition(".")[0]}, running
from mixtral_jax.preparation.config import load_prepare_config
from rich.console import Console
from mixtral_jax.preparation import *
target = {where}
inner, left = target.{function}, [{calls}]
def dies(*args, **kwargs):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kwargs)
target.{function} = dies
running.prepare(load_prepare_config(sys.argv[1], ["shard_megabytes=1"]), Console(quiet=True))
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder / "prepare.yaml")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    finished = {file: file.stat().st_mtime_ns for file in (folder / output / "work").rglob("completions/*")}
    run(config_for(folder, sources, "shard_megabytes=1", output=output))
    assert digests(folder / output) == digests(folder / "out")
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())  # nothing done again


@pytest.mark.drills
def test_a_worker_that_is_killed_ends_the_command_and_the_next_one_goes_on(prepared, monkeypatch):
    folder, sources, _ = prepared
    config = config_for(folder, sources, "shard_megabytes=1", "executor.workers=2", output="worker")
    make_stages = running.make_stages

    def with_killer(*arguments):
        first, *others = make_stages(*arguments)
        assert first.tasks > 1
        return [dataclasses.replace(first, make=lambda: [*first.make(), die]), *others]

    with monkeypatch.context() as patch:
        patch.setattr(running, "make_stages", with_killer)
        with pytest.raises(UserError) as caught:
            run(config)
    words = "a worker was killed; was it out of memory? lower executor.workers"
    assert str(caught.value).startswith(f"the stage pages failed ({words}): see ")
    assert str(caught.value).endswith(", then run the same command to go on")
    run(dataclasses.replace(config, executor=dataclasses.replace(config.executor, workers=1)))
    assert digests(folder / "worker") == digests(folder / "out")


def die(documents, rank=0, world_size=1):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from documents


def test_writes_nothing_outside_the_output(tmp_path):
    # Sockets of the workers lie in TMPDIR, and the system allows their paths about 100 characters.
    temporary = Path(tempfile.mkdtemp())
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.warc").write_bytes(b"".join(warc_members([("http://a.org/", html(prose("en", 1)))], gzipped=False)))
    config_for(tmp_path, f"  - {{name: a, path: {tmp_path}/a.warc}}\n")
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "HF"))} | places
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    settings = ["url_filter.bundled_lists=true", "executor.workers=2"]
    command = [sys.executable, "-m", "mixtral_jax", "prepare", str(tmp_path / "prepare.yaml"), *settings]
    subprocess.run(command, check=True, cwd=tmp_path / "here", env=environment, capture_output=True)
    assert documents(tmp_path / "out")
    places_to_leave_alone = (tmp_path / "home", tmp_path / "here", temporary)
    assert [file for place in places_to_leave_alone for file in place.rglob("*")] == []
    temporary.rmdir()


def test_the_page_needs_no_network(prepared):
    folder, _, _ = prepared
    page = (folder / "out" / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|\s(src|href)=", page)


def test_page_shows_hostile_text_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "<script>alert(1)</script> short"}) + "\n" + json.dumps({"text": prose("en", 1)})
    )
    run(config_for(tmp_path, f"  - {{name: a, path: {tmp_path}/a.jsonl, language: en}}\n"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_bad_input_is_counted_and_named_and_stops_nothing(tmp_path):
    good = prose("en", 1)
    folder = tmp_path / "in"
    folder.mkdir()
    members = warc_members([(f"http://a.org/{n}", html(prose("en", 10 + n))) for n in range(4)])
    (folder / "cut.warc.gz").write_bytes(b"".join(members)[:-30])
    (folder / "empty.warc.gz").write_bytes(b"")
    (folder / "fake.jsonl.gz").write_bytes(b"this is no gzip")
    (folder / "nested.warc.gz").write_bytes(warc_members([("http://b.org/", members[0].decode("latin-1"))])[0])
    lines = [json.dumps({"text": good}).encode(), b"{broken", b'{"text": 3}', b'"\xff"', b'{"text": "\\ud800"}']
    (folder / "bad.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "' + b"x" * (2 << 20) + b'"}']))
    (folder / "no.parquet").write_bytes(b"PAR1 not at all")
    (folder / "latin.html").write_bytes(html(prose("fr", 2)).replace("utf-8", "latin-1").encode("latin-1"))
    (folder / "huge.html").write_bytes(b"<p>" * (1 << 20))
    config = config_for(tmp_path, f"  - {{name: a, path: {folder}}}\n", "extraction.max_megabytes=1")
    run(config)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    named = {(line["where"], line["kind"]) for line in report["problems"]["named"]}
    assert {kind for where, kind in named if "bad.jsonl" in where} == {"bad record", "too large"}
    assert ("a: cut.warc.gz after 3", "truncated gzip") in named
    assert ("a: empty.warc.gz", "empty file") in named
    assert ("a: fake.jsonl.gz line 1", "bad record") in named
    assert ("a: no.parquet", "unreadable file") in named
    assert ("a: huge.html", "too large") in named
    assert report["problems"]["counts"]["bad record"] == 4  # three lines and the fake
    texts = " ".join(doc["text"] for doc in documents(tmp_path / "out"))
    assert all(prose(*text).split("\n")[0] in texts for text in [("en", 1), ("en", 10), ("en", 12), ("fr", 2)])


def test_decontamination_drops_what_holds_a_test(tmp_path):
    leaked, clean = prose("en", 1), prose("en", 2)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": {"stem": leaked.split("\n")[1]}, "label": "A"}) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (leaked, clean)))
    config = config_for(
        tmp_path, f"  - {{name: a, path: {tmp_path}/a.jsonl}}\n", f"decontamination.files=[{tmp_path}/eval.jsonl]"
    )
    run(config)
    assert [doc["text"] for doc in documents(tmp_path / "out")] == [clean]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["contamination"] == {"eval.jsonl": {"texts": 2, "too_short": 1}}


def test_each_rule_can_be_switched_off(tmp_path):
    """With one rule alone its document goes and a good one stays; without any all stay."""
    bad = {
        "gopher_quality": "The cat and the dog sat on it. We like that. They ran off. She saw. He did too, with us.",
        "gopher_repetition": " ".join(["The town and the river have been with that people for years now."] * 9),
        "c4": prose("en", 5) + " {",
        "url_filter": prose("en", 6),
    }
    records = [
        {"text": text, "url": f"http://{'casino' if rule == 'url_filter' else 'plain'}.example.net/{rule}"}
        for rule, text in (bad | {"none": prose("en", 7)}).items()
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"  - {{name: a, path: {tmp_path}/a.jsonl, language: en}}\n"
    for rule in (*bad, "none"):
        off = [f"{other}.enabled=false" for other in bad if other != rule]
        settings = [*ALONE, "url_filter.words=[casino]", "fineweb.enabled=false", *off]
        run(config_for(tmp_path, source, *settings, output=rule))
        kept = {document["url"].rsplit("/", 1)[1] for document in documents(tmp_path / rule)}
        assert "none" in kept
        assert rule not in kept & {*bad}
    assert kept == {*bad, "none"}


def test_other_settings_or_input_in_the_same_output_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose("en", 1)}))
    source = f"  - {{name: a, path: {tmp_path}/a.jsonl}}\n"
    run(config_for(tmp_path, source))
    run(config_for(tmp_path, source, "temperature=5", "executor.workers=2"))
    with pytest.raises(UserError, match=r"prepared with another c4.min_sentences: name another output"):
        run(config_for(tmp_path, source, "c4.min_sentences=1"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose("en", 2)}) + "\n\n")
    with pytest.raises(UserError, match="input files changed"):
        run(config_for(tmp_path, source))


def test_nothing_left_is_no_crash(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Nothing to see."}))
    run(config_for(tmp_path, f"  - {{name: a, path: {tmp_path}/a.jsonl}}\n"))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["total"]["documents"] == 0


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_extractors_take_the_story_and_leave_the_menu(extractor):
    text = EXTRACTORS[extractor](html(prose("en", 1)))
    assert all(line in text for line in prose("en", 1).split("\n"))
    assert "Home" not in text
    assert "<" not in text


@pytest.mark.parametrize("language", ["en", "fr", "de", "es", "it"])
def test_languages_are_told_apart(language, tmp_path):
    document = Document(text=prose(language, 7), id="x", metadata={"language": ""})
    assert LanguageFilter(LanguageConfig(keep=[language]), Examples(tmp_path)).filter(document) is True
    other = Document(text=prose(language, 7), id="x", metadata={"language": ""})
    assert LanguageFilter(LanguageConfig(keep=["pl"]), Examples(tmp_path)).filter(other) == (
        False,
        f"language_{language}",
    )


def test_bundled_lists_block_addresses(tmp_path):
    rule = AddressFilter(UrlFilterConfig(), Examples(tmp_path))

    def verdict(url: str) -> bool | tuple[bool, str]:
        return rule.filter(Document(text="x", id="x", metadata={"url": url, "curated": False}))

    assert verdict("https://en.wikipedia.org/wiki/Town") is True
    with tarfile.open(Path(ASSETS_PATH) / "url_filterblacklistsv0_3_0.tar.gz") as archive:
        domains = archive.extractfile("domains").read(1 << 16).decode().split("\n")
    blocked = next(name for name in domains if re.fullmatch(r"[a-z0-9-]+\.[a-z]{2,4}", name))
    assert verdict(f"http://{blocked}/")[0] is False
    assert verdict("") is True


def test_slurm_gets_one_job_array_a_stage_in_order(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose("en", 1)}))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/bash\nn=$(ls {tmp_path}/bin | wc -l)\ncp "${{@: -1}}" {tmp_path}/bin/job$n\n'
        f'echo "$@" > {tmp_path}/bin/args$n\necho "Submitted batch job $n"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    source = f"  - {{name: a, path: {tmp_path}/a.jsonl}}\n"
    run(config_for(tmp_path, source, "executor.kind=slurm", "executor.partition=cpu", "executor.workers=7"))
    jobs = sorted((tmp_path / "bin").glob("job*"), key=lambda file: int(file.name[3:]))
    names = [re.search(r"--job-name=(\S+)", job.read_text())[1] for job in jobs if "launch_pickled" in job.read_text()]
    assert [name.removeprefix("prepare-") for name in names] == [
        "pages", "exact-signatures", "exact-duplicates", "minhash-signatures", "minhash-buckets", "minhash-clusters",
        "documents", "token-caches", "report",
    ]  # fmt: skip
    assert all("#SBATCH --partition=cpu" in job.read_text() for job in jobs)
    waits = [file for file in (tmp_path / "bin").glob("args*") if "--dependency=afterok:" in file.read_text()]
    assert len(waits) == len(names) - 1


def test_a_second_process_must_wait(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose("en", 1)}))
    config = config_for(tmp_path, f"  - {{name: a, path: {tmp_path}/a.jsonl}}\n")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process prepares"):
            run(config)
