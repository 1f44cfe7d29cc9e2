"""The safetensors format: eight bytes of header length, a JSON header, the tensors.

Written here rather than with the package of that name because tensors are read by slices, headers are checked with
errors that name the tensor, and files are written tensor by tensor.

Source: https://huggingface.co/docs/safetensors
"""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

from mixtral_jax.config import UserError
from mixtral_jax.weights.stored import FILE_TYPES, FileType, StoredTensor, file_type, write_tensor

_TYPES: dict[str, FileType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {value: name for name, value in _TYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of a file.

    Raises:
        UserError: truncated or corrupt file, duplicate name, unreadable type.
    """
    header, start, size = _read_header(file)
    tensors: dict[str, StoredTensor] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            shape, (begin, end), name = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
            ok = isinstance(name, str) and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            raise UserError(f"the header of {file} describes tensor '{key}' wrongly: download the file again")
        tensor = StoredTensor(key, file, file_type(name, _TYPES, key, file), shape, start + begin)
        if tensor.nbytes != end - begin:
            raise UserError(
                f"the header of {file} gives tensor '{key}' {end - begin} bytes, but {name} {list(shape)} "
                f"needs {tensor.nbytes}: download the file again"
            )
        if start + end > size:
            raise UserError(
                f"{file} is truncated: tensor '{key}' ends at byte {start + end}, the file at {size}: download it again"
            )
        tensors[key] = tensor
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            kind = "overlaps the tensor" if tensor.offset < end else "leaves a gap after the one"
            raise UserError(f"tensor '{tensor.key}' of {file} {kind} before it: download the file again")
        end += tensor.nbytes
    if end != size:
        raise UserError(f"{file} has {size - end} bytes after its last tensor: download it again")
    return tensors


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Returns the header, where the data start, and the file's size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{file} is truncated or not a safetensors file ({size} bytes): download it again")
        text = stream.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(f"the header of {file} names tensor '{key}' twice: write the file again")
            seen[key] = value
        return seen

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):  # also too many digits, too deep, not UTF-8
        header = None
    if not isinstance(header, dict):
        raise UserError(f"the header of {file} is corrupt: download the file again")
    return header, 8 + length, size


class SafetensorsWriter:
    """Writes one file, its tensors in any order, by any threads and processes."""

    def __init__(self, file: Path, shapes: dict[str, tuple[int, ...]], dtype: FileType):
        """Plans the file; writes nothing yet."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * FILE_TYPES[dtype].itemsize
            header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file, self._header = file, struct.pack("<Q", len(text)) + text
        del header["__metadata__"]
        self._places = {key: [len(self._header) + at for at in facts["data_offsets"]] for key, facts in header.items()}
        self._size = len(self._header) + end

    def create(self) -> None:
        """Makes the file, its tensors all zero."""
        with self._file.open("wb") as stream:
            stream.write(self._header)
            stream.truncate(self._size)

    def write(self, key: str, pieces: Iterable[UInt[np.ndarray, "..."]]) -> None:
        """Puts a tensor in its place in the file that was made, given as unsigned integers, a piece at a time."""
        begin, end = self._places[key]
        write_tensor(self._file, begin, end, pieces)
