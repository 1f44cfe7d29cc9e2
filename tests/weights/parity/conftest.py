"""Tests against other libraries: collected where requirements-parity.txt is; elsewhere the summary says so."""

import importlib.util
from typing import Any

MISSING = [name for name in ("torch", "transformers", "gguf", "xllamacpp") if importlib.util.find_spec(name) is None]

if MISSING:
    collect_ignore_glob = ["test_gguf.py" if not {"torch", "transformers"} & {*MISSING} else "test_*.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MISSING:
        names = " and ".join(MISSING)
        terminalreporter.write_line(
            f"{', '.join(collect_ignore_glob)} of tests/weights/parity left out: no {names} here "
            "(requirements-parity.txt)"
        )
