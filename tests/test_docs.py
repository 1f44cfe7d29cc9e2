"""The documentation is whole: pages in the navigation, rooms in the table, the picture as the imports are."""

import json
from pathlib import Path

import pytest
import yaml

from docs import plot_runs
from docs.draw_design import PICTURE, draw
from mixtral_jax.config import UserError
from tests.imports import ROOT


def leaves(entry: object) -> list[str]:
    """Lists the pages of a navigation."""
    if isinstance(entry, dict | list):
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in leaves(part)]
    return [str(entry)]


def test_every_page_is_in_the_navigation_once():
    pages = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_table_names_every_room():
    table = [
        line.split("|")[1] for line in (ROOT / "docs" / "design.md").read_text().splitlines() if line.startswith("|")
    ]
    package = ROOT / "mixtral_jax"
    for path in package.iterdir():
        room = f"{path.name}/" if (path / "__init__.py").is_file() else path.name
        if path.name != "__init__.py" and room.endswith((".py", "/")):
            assert any(f"`{room}" in line for line in table), room


def test_the_picture_is_that_of_the_imports():
    assert PICTURE.read_text() == draw(), "run `python -m docs.draw_design`"


def test_functions_of_the_site_exist():
    named = [line[4:] for line in (ROOT / "docs" / "api.md").read_text().splitlines() if line.startswith("::: ")]
    assert named
    for name in named:
        assert Path(ROOT, *name.split(".")).with_suffix(".py").is_file(), name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "say curve, balance, sources, runs, gain, the runs, and the picture's file"),
        (["curve", "runs/a"], "say curve, "),
        (["balance", "runs/a", "a.png"], "say curve, "),
        (["curve", "nowhere", "a.png"], "there is no nowhere/metrics.jsonl: name a run directory"),
    ],
)
def test_mistakes_in_drawing_runs_are_one_sentence(words, sentence):
    with pytest.raises(UserError) as error:
        plot_runs.main(words)
    assert str(error.value).startswith(sentence)


def test_runs_are_drawn_against_the_first_where_both_were_measured(tmp_path):
    for name, steps in (("a", (1, 2)), ("b", (2, 3))):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "heldout/total": 2.0}) for step in steps]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    plot_runs.main(["runs", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").stat().st_size > 1000
