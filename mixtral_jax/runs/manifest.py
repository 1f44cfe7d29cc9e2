"""Checksums of a directory: Orbax does not notice flipped bits, a manifest does."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from mixtral_jax.distributed.processes import take_turn, with_all, work_on
from mixtral_jax.whole_files import flush, write_whole

NAME = "manifest.json"

T = TypeVar("T")
Digests = Callable[[list[str]], list[str]]  # of files by name


def _digest(file: str) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


ALONE: Digests = partial(work_on, _digest)  # this process's own work


def hashing(compute: Callable[[Digests], T], turn: int | None = None) -> T:
    """Lets process 0 compute something with the checksums of files, which all processes work out together.

    Args:
        compute: is given a function that returns the SHA-256 of files; all must see them.
        turn: as `take_turn` gave it, in another thread than the main one.

    Returns:
        What it computes, JSON, in every process.
    """
    return with_all(take_turn() if turn is None else turn, _digest, compute)


def write_manifest(directory: Path, digests: Digests = ALONE) -> None:
    """Writes size and SHA-256 of every file below a directory, last of all: what lacks a manifest is unfinished."""
    files = _files(directory)
    # The checksums must not outlive the data that they speak of, nor the names under which these are found.
    for path in [*files, *sorted({file.parent for file in files})]:
        flush(path)
    facts = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _ordered(files, digests), strict=True)
    }
    write_whole(directory / NAME, json.dumps(facts, indent=1).encode())


def fingerprint(directory: Path) -> str | None:
    """The checksum of all checksums; None where there is no manifest."""
    try:
        return _digest(str(directory / NAME))
    except OSError:
        return None


def find_damage(directory: Path, digests: Digests = ALONE) -> str | None:
    """Compares a directory with its manifest.

    Returns:
        What is wrong, naming the first file concerned; None when every file is as it was written.
    """
    try:
        facts = json.loads((directory / NAME).read_bytes())
        recorded = {name: (fact["bytes"], fact["sha256"]) for name, fact in facts.items()}
    except FileNotFoundError:
        return "it is unfinished: there is no manifest"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    try:
        there = {file.relative_to(directory).as_posix(): file for file in _files(directory)}
        for name, (size, _) in recorded.items():  # which are compared with what is there, and open nothing
            if name not in there:
                return f"{name!r:.200} is missing"
            if (found := there[name].stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size!r:.30}"
        if extra := there.keys() - recorded.keys():
            return f"{min(extra)} does not belong to it"
        digested = _ordered([there[name] for name in recorded], digests)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for (name, (_, expected)), digest in zip(recorded.items(), digested, strict=True):
        if digest != expected:
            return f"{name} is not what was written (checksum)"
    return None


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / NAME)


def _ordered(files: list[Path], digests: Digests) -> list[str]:
    """Asks for the large files first, so that everybody has about the same to read."""
    order = sorted(files, key=lambda file: -file.stat().st_size)
    found = dict(zip(order, digests([str(file) for file in order]), strict=True))
    return [found[file] for file in files]
