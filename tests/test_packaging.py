"""What `pip install .` reads."""

import importlib
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import mixtral_jax

ROOT = Path(__file__).parents[1]


def test_the_files_behind_pyproject_hold_requirements_only():
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    entries = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    for name in (name for entry in entries for name in entry["file"]):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert all(Requirement(line).name for line in lines if line), name  # such as `-r other.txt` breaks the build


def test_the_command_and_the_version_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, function = project["project"]["scripts"]["mixtral-jax"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mixtral_jax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", mixtral_jax.__version__)
    assert f"\n## {mixtral_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_before_a_commit_are_those_of_ci():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        assert re.search(rf"^\.venv/bin/{hook['entry']}( \.)?$", ci, re.MULTILINE), hook["entry"]
