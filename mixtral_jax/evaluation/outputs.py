"""Numbers as a JSON file: whether it can be written, before the work, and the writing."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.config import UserError


def check_writable(path: Path) -> None:
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
        raise UserError(f"cannot write {path}: {problem}; give another file to --json")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all; follows links, and writes through what is no file, such as a pipe.

    Raises:
        UserError: the file cannot be written.
    """
    target = path.resolve()
    direct = target.exists() and not target.is_file()
    fresh = target if direct else target.with_name(f"{target.name}.tmp")
    try:
        fresh.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        if not direct:
            os.replace(fresh, target)
    except OSError as error:
        if not direct:
            fresh.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; give another file to --json") from None
