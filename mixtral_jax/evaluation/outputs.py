"""What a report is written to: whether that can be, before the work, and its numbers as a JSON file."""

import dataclasses
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mixtral_jax.config import UserError
from mixtral_jax.whole_files import write_whole


def check_outputs(json_file: Path | None, plots: Path | None) -> None:
    """Finds out, before the work and before anything heavy is loaded, whether a report can be written.

    Raises:
        UserError: a directory that is missing or cannot be, or no matplotlib.
    """
    if json_file is not None:
        check_writable(json_file)
    if plots is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("pictures need matplotlib: pip install matplotlib, or leave --plots out")
        if plots.exists() and not plots.is_dir():
            raise UserError(f"cannot draw into {plots}: it is a file; give another directory to --plots")


def check_writable(path: Path, option: str = "--json") -> None:
    """Finds out whether `write_json` will be able to write, without a trace.

    Raises:
        UserError: a directory, or no directory to hold the file, or no right to write.
    """
    problem = None
    try:
        target = path.resolve()
        if target.is_dir():
            problem = "it is a directory"
        elif target.exists() and not target.is_file():
            problem = None if os.access(target, os.W_OK) else "Permission denied"
        elif not target.parent.is_dir():
            problem = "there is no such directory"
        else:
            tempfile.TemporaryFile(dir=target.parent).close()
    except (OSError, RuntimeError) as error:  # a circle of links raises either
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(f"cannot write {path}: {problem}; give another file to {option}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all; follows links, and writes through what is no file, such as a pipe.

    Args:
        path: of the file.
        content: what JSON knows, arrays, and dataclasses, which become objects.

    Raises:
        UserError: the file cannot be written.
    """
    target = path.resolve()
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False, default=as_json) + "\n"
    direct = target.exists() and not target.is_file()
    try:
        (target.write_bytes if direct else partial(write_whole, target))(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file to --json") from None


def as_json(value: Any) -> Any:
    """Makes what JSON knows of an array or a dataclass."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value.tolist()  # type: ignore[arg-type]
