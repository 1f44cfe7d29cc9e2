"""Tests against other libraries: collected where requirements-parity.txt is; elsewhere the summary says so."""

import importlib.util
from typing import Any

NEEDS = {"test_*.py": ("torch", "transformers"), "test_gguf.py": ("gguf", "xllamacpp"), "test_peft.py": ("peft",)}
MISSING = [name for names in NEEDS.values() for name in names if importlib.util.find_spec(name) is None]

collect_ignore_glob = [files for files, names in NEEDS.items() if {*names} & {*MISSING}]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MISSING:
        names = " and ".join(MISSING)
        terminalreporter.write_line(
            f"{', '.join(collect_ignore_glob)} of tests/weights/parity left out: no {names} here "
            "(requirements-parity.txt)"
        )
