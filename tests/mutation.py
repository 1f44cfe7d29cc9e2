"""Plants one mistake after another in a copy of the repository and says which of them no test notices.

    python -m tests.mutation [WORD ...]

Only mistakes in files whose name holds one of the words, if there are any. Takes an hour or so for all; not part of CI.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds for the tests of one mistake; a mistake that makes them hang is noticed, too


def noticed(mutant: Mutant, copy: Path) -> str:
    """Plants a mistake, runs its tests, takes it back; says how it went."""
    file = copy / "mixtral_jax" / mutant.file
    text = file.read_text()
    file.write_text(text.replace(mutant.old, mutant.new))
    tests = [f"tests/{name}" for name in mutant.tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        code = subprocess.run(command, cwd=copy, capture_output=True, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        return "killed (time)"
    finally:
        file.write_text(text)
    return {0: "SURVIVED", 1: "killed", 2: "killed (import)"}.get(code, f"NOT RUN (pytest says {code})")


def main(words: list[str]) -> int:
    """Runs all, or those whose file holds a word; the exit code is 1 if one survived."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.file for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs_of_*"))
        for number, mutant in enumerate(chosen, 1):
            result = noticed(mutant, copy)
            survivors += not result.startswith("killed")
            print(f"{number}/{len(chosen)} {result}: {mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
