"""One accelerator in a few minutes: admission, every part of a layer beside the dense rate, stacks, steps, decoding.

    python -m benchmarks.accelerator [--parts products attention] [--limit 360] [--json FILE] [--tiny]

Each part works in a process of its own, with a limit of its own; what it measured is printed at once. A part may start
while the one before works, but touches the device only when that has ended. Arrays are made on the device, and programs
are kept from part to part. `--tiny` checks on a CPU that everything runs and measures nothing. The part `torch` needs
torch with CUDA, and says so where that is not there.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks import measure
from mixtral_jax.kernels.backends import names

MODULES = {  # in the order in which they run: what matters most comes first, should time run out
    "small": "whole_models", "again": "whole_models", "stack": "whole_models", "products": "layer_parts",
    "attention": "layer_parts", "rest": "layer_parts", "wide": "whole_models", "admission": "whole_models",
    "decoding": "whole_models", "torch": "torch_parts",
    # Only if asked for, for the sake of time:
    "stack_fp8": "whole_models", "eight_bit": "layer_parts", "price": "whole_models",
}  # fmt: skip
IF_ASKED = ("stack_fp8", "eight_bit", "price")
# Seconds, of parts that need more than most.
LIMITS = {"stack": 60, "stack_fp8": 60, "eight_bit": 60, "small": 75, "decoding": 60}
LIMIT = 45
FORMULA = (
    "TFLOP/s = useful FLOPs / seconds; TB/s = bytes that must be read and written / seconds; seconds are the median of "
    "3 turns of calls that follow each other without a pause; of dense = TFLOP/s / that of the dense product beside it"
)


@dataclass(frozen=True)
class Options:
    """What parts are told."""

    tiny: bool
    experts: tuple[str, ...]  # backends that are compared; empty: the platform's own


@dataclass
class Part:
    """A part in its process, which waits for a word before it touches the device."""

    name: str
    process: subprocess.Popen[str]
    errors: IO[str]

    @classmethod
    def start(cls, name: str, options: Options) -> "Part":
        """Starts the process, which imports what it needs meanwhile."""
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = [*["--tiny"] * options.tiny, *(["--experts", *options.experts] if options.experts else [])]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.accelerator", "--worker", name, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ},
        )  # fmt: skip
        return cls(name, process, errors)

    def run(self, limit: float) -> list[dict[str, Any]]:
        """Lets it work and says what it measures; a part that fails or takes too long says so in its last row."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        begin, late = time.monotonic(), threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        rows = []
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.close()
            for line in self.process.stdout:
                if line.startswith("{"):
                    rows.append({"part": self.name, **json.loads(line)})
                    print(for_people(rows[-1]), flush=True)
        except BrokenPipeError:
            pass  # it failed before it was asked; its errors say why
        code = self.process.wait()
        timer.cancel()
        if code:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            rows.append({"part": self.name, "failed": f"more than {limit:.0f} s" if late.is_set() else last})
        rows.append({"part": self.name, "what": "the whole part", "seconds": time.monotonic() - begin})
        for row in rows[-2 if code else -1 :]:
            print(for_people(row), flush=True)
        return rows

    def drop(self) -> None:
        """Ends a process that is not needed any more."""
        self.process.kill()
        self.process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; returns how many of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in MODULES if name not in IF_ASKED]
    parser.add_argument("--parts", nargs="+", default=usual, choices=MODULES, help=f"by default {' '.join(usual)}")
    parser.add_argument("--limit", type=float, default=360, help="seconds of all parts together")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--experts", nargs="+", default=[], choices=names("experts"), help="backends to compare")
    parser.add_argument("--tiny", action="store_true", help="sizes that measure nothing")
    parser.add_argument("--worker", choices=MODULES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    told = Options(options.tiny, tuple(options.experts))
    if options.worker:
        work(options.worker, told)
        return 0

    begin = time.monotonic()
    end, rows, waiting = begin + options.limit, [], Part.start(options.parts[0], told)
    for number, name in enumerate(options.parts):
        part, left = waiting, end - time.monotonic()
        if left < 1:
            part.drop()
            rows.append({"part": name, "failed": f"not begun: all parts had {options.limit:.0f} s"})
            print(for_people(rows[-1]), flush=True)
            break
        if number + 1 < len(options.parts):
            waiting = Part.start(options.parts[number + 1], told)
        rows += part.run(min(left, LIMITS.get(name, LIMIT)))
        _write(options.json, rows)
    rows.append({"part": "all", "what": "all parts together", "seconds": time.monotonic() - begin})
    print(for_people(rows[-1]), flush=True)
    _write(options.json, rows)
    return sum("failed" in row for row in rows)


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path:
        path.write_text(json.dumps({"benchmark": "accelerator", "formula": FORMULA, "rows": rows}, indent=1) + "\n")


def for_people(row: dict[str, Any]) -> str:
    """A row in one line."""
    part, what = row["part"], row.get("what", "failed" if "failed" in row else "")
    figures = "  ".join(
        f"{name.replace('_', ' ')} {measure.for_people(value)}"
        for name, value in row.items()
        if name not in ("part", "what")
    )
    return f"{part:10} {what:44} {figures}"


def work(name: str, options: Options) -> None:
    """A part's own side: imports, waits for its turn, measures."""
    module = importlib.import_module(f"benchmarks.{MODULES[name]}")
    sys.stdin.readline()
    getattr(module, name)(options)


if __name__ == "__main__":
    sys.exit(bool(main()))
