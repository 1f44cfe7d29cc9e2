"""What `pip install .` reads."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_files_behind_pyproject_hold_requirements_only():
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    entries = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    for name in (name for entry in entries for name in entry["file"]):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert all(Requirement(line).name for line in lines if line), name  # such as `-r other.txt` breaks the build
