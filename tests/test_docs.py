"""The documentation is whole: pages in the navigation, rooms in the table, the picture as the imports are."""

from pathlib import Path

import yaml

from docs.draw_design import PICTURE, draw
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
