"""Runs targets for long: `python -m tests.fuzz [TARGET ...] [--minutes 10] [--seed 0]`, see docs/reliability.md.

Where the package atheris is installed, what an input reaches in this project's code decides which are changed further;
else they are changed blindly, as in the tests. Each target runs in a process of its own.
"""

import argparse
import contextlib
import logging
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

ROOT = Path(__file__).parents[2]
COMPILED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "mixtral_jax/kernels").rglob("*.py")
]


class Trial:
    """Gives inputs to a target and keeps those that break something, one for each place."""

    def __init__(self, name: str, folder: Path):
        from tests.fuzz.targets import TARGETS

        self.name, self.folder, self.target = name, folder, TARGETS[name]
        self.count = self.good = 0
        self.found = Counter[str]()

    def __call__(self, data: bytes) -> None:
        (self.folder / f"{self.name}-at-work").write_bytes(data)
        self.count += 1
        try:
            self.good += self.target(data)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {place.filename}:{place.lineno}"
            if not self.found[where]:
                (self.folder / f"{self.name}-{len(self.found)}").write_bytes(data)
                traceback.print_exc()
            self.found[where] += 1

    def report(self) -> None:
        print(f"{self.name}: {self.count:,} inputs, {self.good:,} of them read; {dict(self.found) or 'nothing found'}",
              flush=True)  # fmt: skip


def run(trial: Trial, seconds: float, seed: int) -> None:
    """Never returns."""
    from tests.fuzz.samples import mutated

    seeds, end = trial.target.seeds, time.process_time() + seconds

    def one(data: bytes) -> None:
        trial(data)
        if time.process_time() > end:
            trial.report()
            sys.stdout.flush()
            os._exit(bool(trial.found))

    def change(data: bytes, size: int, number: int) -> bytes:
        draw = random.Random(number)
        return mutated(data, draw, seeds)[:size] if draw.randrange(2) else atheris.Mutate(data, size)

    if atheris:
        corpus = trial.folder / f"{trial.name}-corpus"
        corpus.mkdir()
        for number, data in enumerate(seeds):
            (corpus / str(number)).write_bytes(data)
        options = [f"-seed={seed + 1}", "-max_len=20000", "-rss_limit_mb=0", "-verbosity=0"]
        options += ["-timeout=86400", str(corpus)]  # seconds of the clock: paused is no hang; ours is the processor's
        atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
        atheris.Fuzz()
    draw = random.Random(seed)
    while True:
        one(mutated(draw.choice(seeds), draw, seeds))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--minutes", type=float, default=10, help="of processor time, for each target")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with atheris.instrument_imports(include=["mixtral_jax"], exclude=COMPILED) if atheris else contextlib.nullcontext():
        from tests.fuzz.targets import TARGETS
    logging.disable()
    folder, broken = Path(tempfile.mkdtemp(prefix="fuzz-")), []
    print(f"{'guided by coverage' if atheris else 'blindly'}; inputs that break something: {folder}", flush=True)
    for name in asked.targets or TARGETS:
        trial = Trial(name, folder)
        if not (process := os.fork()):
            run(trial, 60 * asked.minutes, asked.seed)
        _, status = os.waitpid(process, 0)
        if status:
            broken.append(name)
        if os.WIFSIGNALED(status):
            print(f"{name}: ended by signal {os.WTERMSIG(status)} at {folder / f'{name}-at-work'}", flush=True)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
