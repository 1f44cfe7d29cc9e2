"""`metrics.jsonl`: one JSON object a logged step, for scripts."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mixtral_jax.config import UserError
from mixtral_jax.whole_files import replacing

Vectors = Mapping[str, Shaped[np.ndarray, "..."]]  # values of a step that are no scalars, by name


class MetricsFile:
    """Appends lines to a metrics file; a line is with the operating system before the next step.

    Strict JSON has no NaN and no infinity: a value that is not finite is written as null.
    """

    def __init__(self, path: Path, resume_step: int):
        """Opens the file and drops what the steps to come will write again.

        Args:
            path: the file; made if missing.
            resume_step: step of the checkpoint from which the run goes on; lines of later steps are dropped, and so
                is a last line that a killed process left half-written. 0: the run starts anew and the file too.

        Raises:
            UserError: a whole line is not a JSON object with a step, or the file cannot be written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                with replacing(path) as file:
                    file.writelines(_line(entry) for entry in read_metrics(path) if 0 < resume_step >= entry["step"])
            self._file = path.open("ab", buffering=0)  # a buffer would hold back lines and fail again at closing
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, step: int, scalars: Mapping[str, int | float], arrays: Vectors) -> None:
        """Appends one line: the step, the scalars, and the arrays as nested lists of numbers with six digits.

        Raises:
            UserError: the disk is full or the like.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        lists = {name: _rounded(array.tolist()) for name, array in arrays.items()}
        line = _line({"step": step, **finite, **lists})
        try:
            while line:  # a nearly full disk takes a part before it refuses
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self._path}: {error.strerror}; fix that and start the run again")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Reads a metrics file, without a last line that is still being written.

    Args:
        path: a `metrics.jsonl`.

    Yields:
        A dictionary a line: `step`, numbers (None where not finite) and nested lists.

    Raises:
        UserError: a whole line is not a JSON object with a step.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                if not isinstance(entry["step"], int):
                    raise TypeError
            except (ValueError, RecursionError, KeyError, TypeError):
                raise UserError(f"line {number} of {path} is not a JSON object with a step: remove the line") from None
            yield entry


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode("ascii") + b"\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if math.isfinite(value) else None
