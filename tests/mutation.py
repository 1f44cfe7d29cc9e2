"""Plants one mistake after another in a copy of the repository and says which of them no test notices.

    python -m tests.mutation [WORD ...]

Only mistakes in files whose name holds one of the words, if there are any. Takes an hour or so for all; not part of CI.
Tests must first pass without a mistake; from then on the quickest run first, since the first failure ends them.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds for the tests of one mistake; a mistake that makes them hang is noticed, too
# What a fork for each mistake need not import again; first what sets the variables that JAX reads.
BEFORE = ("tests.conftest", "pytest", "jax", "flax.nnx", "optax", "orbax.checkpoint", "scipy.special", "sentencepiece")
BROKEN = ("NameError", "ImportError", "ModuleNotFoundError", "SyntaxError", "fixture ")  # any test would notice these


class Watch:
    """A plugin of pytest: the quickest tests first; what each took, and how the first one failed."""

    def __init__(self, seconds: dict[str, float]):
        self.before = seconds
        self.seconds: dict[str, float] = defaultdict(float)
        self.failure = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        files: dict[str, float] = defaultdict(float)
        for item in items:
            files[item.nodeid.partition("::")[0]] += self.before.get(item.nodeid, 0)
        items.sort(key=lambda item: (files[item.nodeid.partition("::")[0]], self.before.get(item.nodeid, 0)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed and not self.failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().splitlines() or [""]
            self.failure = f"{report.nodeid.removeprefix('tests/')} ({reason[0][:100]})"


def run(tests: str, seconds: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Runs tests in a process of its own; says how they failed ("" if they passed) and what each of them took."""
    place = Path("mutation.json").absolute()
    place.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_test, args=(tests.split(), seconds, place))
    process.start()
    process.join(LIMIT)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        return "no end", {}
    if code not in (0, 1):
        return f"NOT RUN: pytest says {code}", {}
    failure, took = json.loads(place.read_text())
    return failure if not any(f"({name}" in failure for name in BROKEN) else f"NOT RUN: {failure}", took


def _test(tests: list[str], seconds: dict[str, float], place: Path) -> None:
    """Imports the package and its tests from the copy."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    watch = Watch(seconds)
    arguments = ["-q", "-x", "-p", "no:cacheprovider", *[f"tests/{name}" for name in tests]]
    code = importlib.import_module("pytest").main(arguments, [watch])
    place.write_text(json.dumps([watch.failure, watch.seconds]))
    os._exit(code)


def noticed(mutant: Mutant, seconds: dict[str, float]) -> str:
    """Plants a mistake, runs its tests, takes it back; says how they failed."""
    file = Path("mixtral_jax") / mutant.file
    text, times = file.read_text(), file.stat()
    file.write_text(text.replace(mutant.old, mutant.new))
    failure, _ = run(mutant.tests, seconds)
    file.write_text(text)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # or Python takes what it compiled of the mistake
    return failure


def main(words: list[str]) -> int:
    """Runs all, or those whose file holds a word; the exit code is 1 if one survived."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.file for word in words)]
    for name in BEFORE:
        importlib.import_module(name)
    killed = 0
    known: dict[str, tuple[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs_of_*"))
        os.chdir(copy)
        sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
        for number, mutant in enumerate(chosen, 1):
            if mutant.tests not in known:
                known[mutant.tests] = run(mutant.tests, {})
            without, seconds = known[mutant.tests]
            failure = f"NOT RUN: without it, too: {without}" if without else noticed(mutant, seconds)
            result = failure if failure.startswith("NOT RUN") else f"killed: {failure}" if failure else "SURVIVED"
            killed += result.startswith("killed")
            print(f"{number}/{len(chosen)} {mutant.file}: {mutant.old!r} -> {mutant.new!r}: {result}", flush=True)
        os.chdir(ROOT)
    print(f"{killed} of {len(chosen)} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
