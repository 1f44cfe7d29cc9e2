"""The run directory: one trainer at a time, one configuration for its whole life."""

import fcntl
import json
import os
import socket
from contextlib import AbstractContextManager
from operator import attrgetter
from pathlib import Path

from mixtral_jax.config import RESUMABLE_KEYS, Config, UserError
from mixtral_jax.config_loading import changed_keys, parse_config, to_yaml
from mixtral_jax.distributed.processes import is_main
from mixtral_jax.whole_files import UNFINISHED, write_whole

CONFIG = "config.yaml"
LOCK = "lock"
# A config.yaml that a person wrote must not be taken for a run's, and overwritten.
MARK = "# Every key of this run, as resolved by train.py.\n"


class RunDirectory(AbstractContextManager["RunDirectory"]):
    """A locked run directory; a context manager that unlocks. The kernel unlocks for a process that is killed.

    Of several processes the main one alone locks, compares and writes.
    """

    def __init__(self, path: Path, config: Config):
        """Creates and locks the directory, and compares the configuration of a run that is already there.

        Raises:
            UserError: another trainer is at work here, the directory holds something else or another configuration,
                or it cannot be written.
        """
        self.path = path
        self.config = config
        if not is_main():
            return
        self._created = not path.exists()
        self._take_lock()
        try:
            self._compare()
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # On NFS a lock that its holder removes stays for a moment, under another name.
            names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".nfs")]
            foreign = [name for name in names if name not in (LOCK, CONFIG + UNFINISHED)]
            if foreign and not _is_run(path):
                raise UserError(
                    f"run_dir {path} holds {min(foreign)} and no run: name a new or empty directory as run_dir"
                )
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(self._lock)
            os.close(self._lock)
            raise UserError(f"{path} is in use by {holder}: stop that one or choose another run_dir") from None
        except OSError as error:
            os.close(self._lock)
            raise UserError(
                f"{path} cannot be locked against a second trainer ({error.strerror}): choose a run_dir on a file "
                "system with locks, or mount this one with them"
            ) from None
        # The holder before us may have removed the file between our opening and our locking it.
        if not (path / LOCK).exists() or (path / LOCK).stat().st_ino != os.fstat(self._lock).st_ino:
            os.close(self._lock)
            self._take_lock()

    def write_config(self) -> None:
        """Writes the resolved configuration; called when nothing can be wrong with the input any more."""
        if not is_main():
            return
        try:
            write_whole(self.path / CONFIG, (MARK + to_yaml(self.config)).encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _compare(self) -> None:
        file = self.path / CONFIG
        if not file.exists() or not any((self.path / "checkpoints").glob("*/manifest.json")):
            return  # nothing learnt yet that another configuration could spoil
        old = parse_config(file.read_text(encoding="utf-8"), where=str(file), saved=True)
        differences = [
            f"{key}={attrgetter(key)(old)}, not {attrgetter(key)(self.config)}"
            for key in changed_keys(old, self.config)
            if not any(key == free or key.startswith(free + ".") for free in RESUMABLE_KEYS)
        ]
        if differences:
            raise UserError(
                f"{self.path} holds a run with {'; '.join(differences)}: choose another run_dir or the old values"
            )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write run_dir {self.path}: {error.strerror}; make room or name another run_dir")

    def close(self) -> None:
        """Unlocks; a directory in which nothing came to be is removed."""
        if not is_main():
            return
        (self.path / LOCK).unlink(missing_ok=True)
        os.close(self._lock)
        if self._created and not any(self.path.iterdir()):
            self.path.rmdir()

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_run(path: Path) -> bool:
    file = path / CONFIG
    return file.is_file() and file.read_bytes().startswith(MARK.encode())


def _read_holder(lock: int) -> str:
    try:
        holder = json.loads(os.pread(lock, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, RecursionError, KeyError, TypeError):
        return "another trainer"
