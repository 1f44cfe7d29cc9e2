"""The files of a preparation: as for training, a name that exists is a name, and no file comes twice."""

import json
import logging
import os

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.preparation.config import PrepareSource
from mixtral_jax.preparation.plan import list_files
from tests.preparation.inputs import config_for, prose, run


def names(path):
    return [file.name for file in list_files(PrepareSource(name="s", path=str(path)))]


def test_a_name_that_exists_is_no_pattern(tmp_path):
    folder = tmp_path / "crawl [2024]"
    folder.mkdir()
    for name in ("part[1].jsonl", "part1.jsonl", "part2.jsonl"):
        (folder / name).write_text("{}")
    assert names(folder / "part[1].jsonl") == ["part[1].jsonl"]
    assert names(folder) == names(folder / "*.jsonl") == ["part1.jsonl", "part2.jsonl", "part[1].jsonl"]
    assert names(f"file://{tmp_path}/crawl*/part?.jsonl") == ["crawl [2024]/part1.jsonl", "crawl [2024]/part2.jsonl"]
    assert names(tmp_path / "crawl*" / "part?.jsonl") == ["crawl [2024]/part1.jsonl", "crawl [2024]/part2.jsonl"]


def test_links_and_hidden_files_are_left_out_and_said(tmp_path, caplog, monkeypatch):
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "._b.jsonl").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["b.jsonl"]
    assert caplog.messages == ["source 's': 1 files; left out: 1 hidden, 1 links to what is there already"]
    monkeypatch.chdir(tmp_path)
    (file,) = list_files(PrepareSource(name="s", path="b.jsonl"))
    assert (file.path, file.name, file.size) == (str(tmp_path / "b.jsonl"), "b.jsonl", 2)
    assert file.version == str((tmp_path / "b.jsonl").stat().st_mtime)
    with pytest.raises(UserError, match=r"source 's': cannot find none"):
        names("none")


def test_files_of_other_kinds_and_odd_names_are_counted_and_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.arc", "b.wat.gz", "c.jsonl.bz2", "d.bz2", "README"):
        (folder / name).write_text("x")
    odd = os.fsencode(folder) + b"/caf\xe9.jsonl"
    with open(odd, "w") as out:
        out.write(json.dumps({"text": prose("en", 1)}))
    run(config_for(tmp_path, f"  - {{name: a, path: {folder}}}\n"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kinds = (".arc", ".wat.gz", ".jsonl.bz2", ".bz2", "README")
    assert report["input"]["a"]["left_out"] == {f"of another kind ({kind})": 1 for kind in kinds}
    assert report["input"]["a"]["encoding"] == {"UTF-8": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in ("1 UTF-8", "1 of another kind (.wat.gz)"))
    assert report["total"]["documents"] == 1
    (file,) = list_files(PrepareSource(name="s", path=str(folder)))
    assert file.name == "caf\\xe9.jsonl"
