"""Tests against TRL: collected where requirements-parity.txt is installed; elsewhere the summary says so."""

import importlib.util
from typing import Any

MISSING = [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]

if MISSING:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MISSING:
        names = " and ".join(MISSING)
        terminalreporter.write_line(f"tests/training/parity left out: no {names} here (requirements-parity.txt)")
