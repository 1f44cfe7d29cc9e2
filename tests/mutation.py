"""Plants one mistake after another in a copy of the repository and says which of them no test notices.

    python -m tests.mutation [WORD ...]

Only mistakes of which the file or the text to replace holds one of the words, if there are any. Takes an hour or so for
all; not part of CI.
Tests that fail without a mistake are left out and named; the others run the quickest first, up to the first failure.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds for the tests of one mistake; a mistake that makes them hang is noticed, too
# What a fork for each mistake need not import again; first what sets the variables that JAX reads.
BEFORE = ("tests.conftest", "pytest", "jax", "flax.nnx", "optax", "orbax.checkpoint", "scipy.special", "sentencepiece")
BROKEN = ("NameError", "ImportError", "ModuleNotFoundError", "SyntaxError", "fixture ")  # any test would notice these


class Watch:
    """A plugin of pytest: the quickest tests first; what each took, and how those failed that did."""

    def __init__(self, before: dict[str, float], left_out: list[str]):
        self.before = before
        self.left_out = left_out
        self.seconds: dict[str, float] = defaultdict(float)
        self.failures: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        files: dict[str, float] = defaultdict(float)
        for item in items:
            files[item.nodeid.partition("::")[0]] += self.before.get(item.nodeid, 0)
        items[:] = sorted(
            (item for item in items if item.nodeid not in self.left_out),
            key=lambda item: (files[item.nodeid.partition("::")[0]], self.before.get(item.nodeid, 0)),
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().splitlines() or [""]
            self.failures.setdefault(report.nodeid, reason[0][:100])


class Outcome(NamedTuple):
    """How tests ended."""

    problem: str  # why they could not run; empty: they did
    failures: dict[str, str]
    seconds: dict[str, float]


def run(tests: list[str], before: Outcome | None) -> Outcome:
    """Runs tests in a process of its own; with an outcome of before, up to the first failure that is new."""
    place = Path("mutation.json").absolute()
    process = multiprocessing.get_context("fork").Process(target=_test, args=(tests, before, place))
    process.start()
    process.join(LIMIT if before else None)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        return Outcome("", {"the time": f"more than {LIMIT} s"}, {})
    if code not in (0, 1):
        return Outcome(f"pytest says {code}", {}, {})
    failures, seconds, modules = json.loads(place.read_text())
    if before is None:  # what other people wrote is imported once for all that follow
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    return Outcome("", failures, seconds)


def _test(tests: list[str], before: Outcome | None, place: Path) -> None:
    """Imports the package and its tests from the copy."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    watch = Watch(before.seconds, list(before.failures)) if before else Watch({}, [])
    # Without checks of types, which take most of the time, and notice what no test of what is computed does.
    arguments = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", *["-x"] * bool(before)]
    code = importlib.import_module("pytest").main([*arguments, *[f"tests/{name}" for name in tests]], [watch])
    theirs = [name for name in sys.modules if name.partition(".")[0] not in ("tests", "mixtral_jax", "__main__")]
    place.write_text(json.dumps([watch.failures, watch.seconds, theirs]))
    os._exit(code)


def noticed(mutant: Mutant, before: Outcome) -> str:
    """Plants a mistake, runs its tests, takes it back; says how it went."""
    file = Path("mixtral_jax") / mutant.file
    text, times = file.read_text(), file.stat()
    file.write_text(text.replace(mutant.old, mutant.new))
    outcome = run(mutant.tests.split(), before)
    file.write_text(text)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # or Python takes what it compiled of the mistake
    if outcome.problem:
        return f"NOT RUN: {outcome.problem}"
    how = [f"{test.removeprefix('tests/')} ({reason})" for test, reason in outcome.failures.items()]
    if any(reason.startswith(BROKEN) for reason in outcome.failures.values()):
        return f"NOT RUN: {how[0]}"
    return f"killed: {how[0]}" if how else "SURVIVED"


def main(words: list[str]) -> int:
    """Runs all, or those that the words choose; the exit code is 1 if one survived."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in f"{mutant.file} {mutant.old}" for word in words)]
    for name in BEFORE:
        importlib.import_module(name)
    killed = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs_of_*"))
        os.chdir(copy)
        sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
        before = run(list(dict.fromkeys(name for mutant in chosen for name in mutant.tests.split())), None)
        if before.problem:
            raise SystemExit(f"the tests do not run without a mistake either: {before.problem}")
        for test, reason in before.failures.items():
            print(f"left out, for it fails without a mistake: {test} ({reason})", flush=True)
        for number, mutant in enumerate(chosen, 1):
            result = noticed(mutant, before)
            killed += result.startswith("killed")
            print(f"{number}/{len(chosen)} {mutant.file}: {mutant.old!r} -> {mutant.new!r}: {result}", flush=True)
        os.chdir(ROOT)
    print(f"{killed} of {len(chosen)} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
