"""Which files a path names: a file, a directory with all below it, or a pattern. Each comes once."""

import fnmatch
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = frozenset("*?[")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True)
class Listing:
    """What a path names."""

    files: list[Path]  # in the order of their names
    left_out: Counter[str]  # how many, by reason
    root: Path  # the directory, that of the file, or the one that the pattern begins in

    def say(self) -> str:
        """Says in some words what was left out; empty: nothing."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))


def list_files(name: str | Path, readable: Callable[[str], object], *, empty: bool = True) -> Listing:
    """Lists the files that a path names.

    A name that exists is a name, whatever characters it holds; in a pattern, that goes for each part. Links are
    followed. Below a directory, what is hidden or of another kind is left out; a pattern names kinds itself.

    Args:
        name: the path; `~` is the home.
        readable: says by a file's name whether it is of a kind that can be read.
        empty: whether files without a byte are listed too.

    Raises:
        OSError: a directory that cannot be listed.
    """
    path = Path(name).expanduser()
    left_out: Counter[str] = Counter()
    found: Iterable[Path]
    if path.is_dir():
        root, found = path, _below(path, left_out)
    elif path.exists():
        root, found = path.parent, [path]
    else:
        literal, pattern = _literal(Path(path.anchor), path.relative_to(path.anchor).parts)
        root, found = literal, _matches(literal, pattern, left_out)
    # Of several paths to a file, the one without a link counts.
    top = os.path.realpath(root)
    paths = sorted((os.path.realpath(file) != os.path.join(top, file.relative_to(root)), file) for file in set(found))
    files: dict[tuple[int, int], Path] = {}
    for _, file in paths:
        if not file.exists():
            left_out["broken links"] += 1
        elif not file.is_file():
            left_out["directories and the like"] += 1
        elif root == path and not readable(file.name):
            left_out[other_kind(file.name)] += 1
        elif not empty and not file.stat().st_size:
            left_out["empty"] += 1
        elif files.setdefault(identity(file), file) != file:
            left_out["links to what is there already"] += 1
    return Listing(sorted(files.values()), left_out, root)


def other_kind(name: str) -> str:
    """Says why a file is left out whose name tells of no kind that can be read."""
    path = Path(name)
    suffix = "".join(path.suffixes[-2:]) if path.suffix in COMPRESSED else path.suffix
    return f"of another kind ({os.fsencode(suffix or path.name).decode('utf-8', 'backslashreplace')})"


def identity(path: Path) -> tuple[int, int]:
    """Tells whether two paths lead to the same file or directory."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _below(directory: Path, left_out: Counter[str]) -> Iterator[Path]:
    """All that is below a directory but directories; those behind links come last, and none comes twice."""
    for folder in _directories(directory, left_out):
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif not Path(entry).is_dir():
                yield Path(entry)


def _directories(top: Path, left_out: Counter[str]) -> Iterator[Path]:
    near, linked, seen = [top], list[Path](), set[tuple[int, int]]()
    while near or linked:
        folder = near.pop() if near else linked.pop()
        if identity(folder) in seen:
            left_out["links to what is there already"] += 1
            continue
        seen.add(identity(folder))
        yield folder
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True):
            if Path(entry).is_dir() and not entry.name.startswith("."):
                (linked if entry.is_symlink() else near).append(Path(entry))


def _literal(base: Path, parts: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """Goes down as far as the parts are names that exist."""
    while parts and (base / parts[0]).exists():
        base, parts = base / parts[0], parts[1:]
    return base, parts


def _matches(base: Path, parts: tuple[str, ...], left_out: Counter[str]) -> Iterator[Path]:
    base, parts = _literal(base, parts)
    if not parts:
        yield base
    elif parts == ("**",):
        yield from _below(base, left_out)
    elif parts[0] == "**":
        for folder in _directories(base, left_out):
            yield from _matches(folder, parts[1:], left_out)
    elif base.is_dir() and MAGIC & set(parts[0]):
        for entry in sorted(os.scandir(base), key=lambda entry: entry.name):
            hidden = entry.name.startswith(".") and not parts[0].startswith(".")
            if not hidden and fnmatch.fnmatchcase(entry.name, parts[0]):
                yield from _matches(Path(entry), parts[1:], left_out)
