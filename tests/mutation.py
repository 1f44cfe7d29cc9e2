"""Plants one mistake after another in a copy of the repository and says which of them no test notices.

    python -m tests.mutation [WORD ...]

Only mistakes in files whose name holds one of the words, if there are any. Takes an hour or so for all; not part of CI.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds for the tests of one mistake; a mistake that makes them hang is noticed, too
# What a fork for each mistake need not import again; first what sets the variables that JAX reads.
BEFORE = ("tests.conftest", "pytest", "jax", "flax.nnx", "optax", "orbax.checkpoint", "scipy.special", "sentencepiece")


def noticed(mutant: Mutant, copy: Path) -> str:
    """Plants a mistake, runs its tests, takes it back; says how it went."""
    file = copy / "mixtral_jax" / mutant.file
    text = file.read_text()
    file.write_text(text.replace(mutant.old, mutant.new))
    process = multiprocessing.get_context("fork").Process(target=_test, args=(mutant.tests.split(),))
    process.start()
    process.join(LIMIT)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    file.write_text(text)
    known = {None: "killed (time)", 0: "SURVIVED", 1: "killed", 2: "killed (import)"}
    return known.get(code, f"NOT RUN (pytest says {code})")


def _test(tests: list[str]) -> None:
    """In a process of its own: imports the package and its tests from the copy."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    pytest = importlib.import_module("pytest")
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *[f"tests/{name}" for name in tests]]))


def main(words: list[str]) -> int:
    """Runs all, or those whose file holds a word; the exit code is 1 if one survived."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.file for word in words)]
    for name in BEFORE:
        importlib.import_module(name)
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs_of_*"))
        os.chdir(copy)
        sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
        for number, mutant in enumerate(chosen, 1):
            result = noticed(mutant, copy)
            survivors += not result.startswith("killed")
            print(f"{number}/{len(chosen)} {result}: {mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True)
        os.chdir(ROOT)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
