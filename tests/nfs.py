"""What NFS does otherwise than a file system of this machine, made of one: for Python's own calls alone."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def replay_renames(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Makes every rename happen and then say that there is no such file, as when the client had to ask twice.

    Returns:
        What was renamed, under its new name.
    """
    renamed = []

    def replayed(rename: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, target: Any, **options: Any) -> None:
            rename(path, target, **options)
            renamed.append(Path(target))
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path), None, str(target))

        return call

    monkeypatch.setattr(os, "rename", replayed(os.rename))
    monkeypatch.setattr(os, "replace", replayed(os.replace))
    return renamed


def keep_files_in_use(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Gives a file that this process has open or mapped another name where it would be removed or replaced.

    Returns:
        What removes those that are no longer in use, and returns the others.
    """
    kept: list[Path] = []
    unlink, replace, rmdir, close = os.unlink, os.replace, os.rmdir, os.close

    def whole(path: Any, handle: int | None) -> Path:
        return Path(path) if handle is None else Path(os.readlink(f"/proc/self/fd/{handle}"), path)

    def keep(path: Path) -> bool:
        found = path.lstat()
        if (found.st_dev, found.st_ino) not in _in_use():
            return False
        if path in kept:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        kept.append(path.with_name(f".nfs{found.st_ino:016x}"))
        replace(path, kept[-1])
        return True

    def remaining() -> list[Path]:
        used = _in_use()
        for path in list(kept):
            found = path.lstat()
            if (found.st_dev, found.st_ino) not in used:
                unlink(path)
                kept.remove(path)
        return kept

    def unlinking(path: Any, *, dir_fd: int | None = None) -> None:
        if not keep(whole(path, dir_fd)):
            unlink(path, dir_fd=dir_fd)

    def replacing(path: Any, target: Any, **options: Any) -> None:
        if Path(target).is_file():
            keep(Path(target))
        replace(path, target, **options)

    def removing(path: Any, *, dir_fd: int | None = None) -> None:
        remaining()
        rmdir(path, dir_fd=dir_fd)

    def closing(handle: int) -> None:
        close(handle)
        remaining()

    patches = (("unlink", unlinking), ("remove", unlinking), ("rename", replacing), ("replace", replacing),
               ("rmdir", removing), ("close", closing))  # fmt: skip
    for name, call in patches:
        monkeypatch.setattr(os, name, call)
    return remaining


def _in_use() -> set[tuple[int, int]]:
    """Devices and numbers of the files that this process has open or mapped."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            found.add((status.st_dev, status.st_ino))
    for line in Path("/proc/self/maps").read_text().splitlines():
        major, minor = line.split()[3].split(":")
        found.add((os.makedev(int(major, 16), int(minor, 16)), int(line.split()[4])))
    return found
