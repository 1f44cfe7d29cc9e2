"""A tensor in a file: where its bytes lie, read through a memory map and only where it is indexed, and written."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt

from mixtral_jax.config import UserError

FileType = Literal["float32", "bfloat16", "float16"]
FILE_TYPES: dict[FileType, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, row by row, in one piece of a file."""

    key: str
    file: Path
    dtype: FileType
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * FILE_TYPES[self.dtype].itemsize

    def open(self) -> UInt[np.ndarray, "..."]:
        """Maps the tensor's bytes as unsigned integers of the same width, which numpy copies faster than bfloat16."""
        width = np.dtype(f"u{FILE_TYPES[self.dtype].itemsize}")
        return np.memmap(self.file, dtype=width, mode="r", offset=self.offset, shape=self.shape)


def write_tensor(file: Path, begin: int, end: int, pieces: Iterable[Shaped[np.ndarray, "..."]]) -> None:
    """Puts a tensor in its place in a file that is there, a piece at a time.

    Args:
        file: which others may write at the same time, in other places.
        begin: where it begins, in bytes.
        end: where it ends.
        pieces: of it, in order.
    """
    with os.fdopen(os.open(file, os.O_WRONLY), "wb") as stream:
        stream.seek(begin)
        for piece in pieces:
            stream.write(np.ascontiguousarray(piece).data)
        assert stream.tell() == end, (file, begin)
        if hasattr(os, "posix_fadvise"):  # the disk is to begin at once, not when memory is full
            stream.flush()
            os.posix_fadvise(stream.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def file_type(name: str, names: dict[str, FileType], key: str, file: Path) -> FileType:
    """Looks up a file format's own name of a float type.

    Raises:
        UserError: a type that is not read.
    """
    if name not in names:
        raise UserError(f"tensor '{key}' of {file} has type {name}: convert it to one of {', '.join(FILE_TYPES)}")
    return names[name]
