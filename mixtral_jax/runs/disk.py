"""What a disk may refuse to a checkpoint, as sentences: before it is written, and of errors while it is."""

import errno
import os
import re
import shutil
from pathlib import Path

from mixtral_jax.config import UserError

FILES = 256  # more than a checkpoint has, with what is made and removed on the way
INTACT = "start the same command again, the earlier checkpoints are intact"


def check_room(directory: Path, needed: int, then: str = INTACT) -> None:
    """Raises `UserError` where a disk has no room for a checkpoint.

    Args:
        directory: of the checkpoints.
        needed: bytes of the new one's arrays.
        then: what to do when there is.
    """
    free = shutil.disk_usage(directory).free
    if free < needed * 1.05:
        raise UserError(
            f"no room for a checkpoint in {directory}: it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
            f"free; make room and {then}"
        )
    system = os.statvfs(directory)
    if system.f_files and system.f_favail < FILES:  # Orbax would try for minutes
        raise UserError(
            f"no room for a checkpoint in {directory}: the disk takes {system.f_favail} more files, whatever their "
            f"size; remove some and {then}"
        )


def explain(error: Exception, step: int, directory: Path) -> Exception:
    """Returns the `UserError` that an error of a save stands for, or the error itself.

    Args:
        error: of Orbax, of tensorstore below it, or of ours.
        step: of the checkpoint.
        directory: of the checkpoints.
    """
    number = system_error(error)
    if number is None:
        return error
    reason = "the disk is full" if number == errno.ENOSPC else os.strerror(number)
    return UserError(f"checkpoint {step} could not be written to {directory}: {reason}; fix that and {INTACT}")


def system_error(error: Exception) -> int | None:
    """Finds the system's number of an error of a save; None where the system was not to blame."""
    text = f"{error} {error.__cause__ or ''}"
    code = re.search(r"os_error_code='(\d+)'", text)  # how tensorstore tells of the system's errors
    number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
    return errno.ENOSPC if number is None and "RESOURCE_EXHAUSTED" in text else number
