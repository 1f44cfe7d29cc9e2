"""The list of planted mistakes fits the code: each old text stands once in its file, and its tests exist."""

from collections import Counter
from pathlib import Path

from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[1]


def test_every_mistake_can_be_planted():
    wrong = [
        f"{mutant.file}: {mutant.old!r} stands there {count} times"
        for mutant in MUTANTS
        if (count := (ROOT / "mixtral_jax" / mutant.file).read_text().count(mutant.old)) != 1
    ]
    assert not wrong, "\n".join(wrong)
    assert all(mutant.old != mutant.new for mutant in MUTANTS)
    for file, _, name in {test.partition("::") for mutant in MUTANTS for test in mutant.tests.split()}:
        path = ROOT / "tests" / file
        assert path.exists(), file
        assert not name or f"def {name.partition('[')[0]}(" in path.read_text(), name


def test_there_are_enough_of_them():
    assert len(MUTANTS) >= 100
    assert max(Counter(MUTANTS).values()) == 1
