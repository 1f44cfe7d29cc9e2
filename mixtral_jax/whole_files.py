"""Files and directories that appear whole or not at all, and what becomes of those that a killed process left behind.

Both are written under another name. A file's is always the same, so that its next writer takes it over; a directory's
is nobody else's, and the next process that wants one like it removes those that no living one holds.
"""

import contextlib
import fcntl
import glob
import hashlib
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".partial"  # how the names of what is being written end
_LOCK, _CONTENT = "lock", "content"

log = logging.getLogger(__name__)


def write_whole(target: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file whole or not at all; see `replacing`."""
    with replacing(target, durable=durable) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(target: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `target` when it is written; a second process waits for the first.

    Args:
        target: the name that it gets.
        durable: whether it is on the disk then, and survives the machine; else what reads it must notice.

    Yields:
        The file.
    """
    partial = target.with_name(target.name + UNFINISHED)
    with _locked(partial) as file:
        try:
            file.truncate()
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            move(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def move(path: Path, target: Path) -> None:
    """Renames a file or directory; `target` is replaced if it is a file or an empty directory.

    A client of NFS that hears no answer asks again. The server has renamed by then and says that there is no such file.
    """
    moved = path.lstat()
    try:
        os.replace(path, target)
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(moved, target.lstat()):
                return
        raise


def sealed(data: bytes) -> bytes:
    """Puts a checksum behind what a file is to hold."""
    return data + hashlib.sha256(data).digest()


def unsealed(content: bytes) -> bytes | None:
    """What was sealed; None where a file is not as it was written."""
    data, digest = content[:-32], content[-32:]
    return data if hashlib.sha256(data).digest() == digest else None


def _locked(path: Path) -> BinaryIO:
    """Opens a file that nobody else writes, new or left behind."""
    while True:
        file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # the holder before us may have renamed or removed it
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def flush(path: Path) -> None:
    """Brings a file or a directory's entries to the disk, so that a rename never outlives the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_place(stem: Path) -> tuple[Path, Callable[[], None]]:
    """Names a path that nobody else uses or may enter, and removes those that killed processes have left.

    Args:
        stem: how the name of the directory around it begins, which is made; the one above must be there.

    Returns:
        The path, where nothing is yet, and what removes everything in the end.
    """
    for left in stem.parent.glob(f"{glob.escape(stem.name)}.*{UNFINISHED}"):
        if _is_left(left) and _remove(left):
            log.warning("removed %s, which a killed process had left", left)
    directory = stem.with_name(f"{stem.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
    directory.mkdir(mode=0o700)
    lock = (directory / _LOCK).open("wb")
    with contextlib.suppress(OSError):  # without locks nobody will know that it is left, and it stays
        fcntl.flock(lock, fcntl.LOCK_EX)

    def remove() -> None:
        lock.close()
        _remove(directory)

    return directory / _CONTENT, remove


def _is_left(directory: Path) -> bool:
    """Whether a directory is ours, and the process that made it is gone."""
    with contextlib.suppress(OSError):
        found = directory.lstat()  # in a directory for all, a link may lead to where something else is ours
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            with (directory / _LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
    return False


def _remove(directory: Path) -> bool:
    """Removes a directory, the lock that it is known by last; returns whether that could be done."""
    content = directory / _CONTENT
    for _ in range(10):  # threads and processes that are about to end may still write into it
        with contextlib.suppress(OSError):
            content.unlink() if content.is_file() else shutil.rmtree(content)
        if not content.exists():
            shutil.rmtree(directory, ignore_errors=True)
            return not directory.exists()
        time.sleep(0.1)
    return False
