"""The directory of caches: where it is, one builder at a time, nothing half-written under its final name."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from mixtral_jax.config import UserError
from mixtral_jax.config_loading import home_expanded
from mixtral_jax.whole_files import UNFINISHED, flush, move, write_whole

log = logging.getLogger(__name__)


def cache_directory(configured: str) -> Path:
    """Makes and names the directory of caches: the configured one, or the user's own (`XDG_CACHE_HOME`).

    Raises:
        UserError: the directory cannot be made.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(home_expanded(configured or f"{home}/mixtral_jax"))
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turns the system's refusal to write below a directory of caches into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {directory}: {error.strerror or error}; free space there or set "
            "data.cache_dir to another directory"
        ) from None


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the right to build `target`; a second process waits until the first is done, or dead."""
    with explained(target.parent):
        lock = open(target.with_name(target.name + ".lock"), "w")  # noqa: SIM115
    with lock:
        with explained(target.parent):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting for another process that builds %s", target)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """Gives a directory to fill and renames it to `target` when all went well; needs the lock of `target`.

    Leftovers of a builder that was killed, and a `target` that is no longer good, are removed.
    """
    partial = target.with_name(target.name + UNFINISHED)
    with explained(target.parent):
        try:
            for stale in (partial, target):
                if stale.exists():
                    shutil.rmtree(stale)
            partial.mkdir()
            yield partial
            for file in partial.iterdir():
                flush(file)
            move(partial, target)
            flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def altered_file(directory: Path, sha256: Mapping[str, str], stamps: Path) -> str | None:
    """Names a file that is not what was written; one look at each cache, and another when it was moved or touched.

    Args:
        directory: of a cache.
        sha256: hexadecimal digests of its files by name.
        stamps: directory that remembers what was found good.
    """
    status = {name: (directory / name).stat() for name in sha256}
    facts = [
        (str((directory / name).resolve()), status[name].st_size, status[name].st_mtime_ns, sha256[name])
        for name in sorted(sha256)
    ]
    stamp = stamps / f"verified-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"
    if stamp.exists():
        return None
    for name, digest in sha256.items():
        with open(directory / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return name
    write_file(stamp, b"")
    return None


def write_file(target: Path, data: bytes) -> None:
    """Writes a whole file or nothing."""
    with explained(target.parent):
        write_whole(target, data)
