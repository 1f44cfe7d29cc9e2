"""PyTorch's zip checkpoints without PyTorch: a pickle that may only name tensors, and their storages uncompressed.

Unpickling can run any code. The reader here knows the handful of names that a dictionary of tensors needs and refuses
every other, so a file can describe tensors and nothing else.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import UInt

from mixtral_jax.config import UserError
from mixtral_jax.weights.stored import FILE_TYPES, FileType, StoredTensor, file_type

_TYPES: dict[str, FileType] = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
_NAMES = {value: name for name, value in _TYPES.items()}
_STORAGES = (*_TYPES, "DoubleStorage", "LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage",
             "BoolStorage")  # fmt: skip
_MAX_PICKLE = 100_000_000  # bytes; as much as safetensors allows for its header


class _Storage(NamedTuple):
    type_name: str
    member: str
    length: int  # elements


class _View(NamedTuple):
    storage: Any
    start: Any  # elements
    shape: Any
    strides: Any


class _StateDict(dict):
    """Stands for OrderedDict; what PyTorch hangs on it (`_metadata`) is dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _RebuildTensor:
    """Stands for torch._utils._rebuild_tensor_v2."""

    __slots__ = ()

    def __call__(self, storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> _View:
        return _View(storage, start, shape, strides)


class _RebuildParameter:
    """Stands for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, view: Any, *rest: Any) -> Any:
        return view


class _RefusedError(Exception):
    pass


class _Unpickler(pickle._Unpickler):  # written in Python: the other one takes as much memory as a file asks for
    # This one does so for arrays of bytes, which hold no tensors.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if (module, name) == ("collections", "OrderedDict"):
            return _StateDict
        if module == "torch" and name in _STORAGES:
            return name
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(type_name), str(member), _, int(length)):
                return _Storage(type_name, member, length)
        raise pickle.UnpicklingError("unknown persistent id")


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """Reads where the tensors of a checkpoint lie; runs no code from the file.

    Raises:
        UserError: truncated, corrupt or old-style file, anything but tensors in it, unreadable type.
    """
    folder, members, pickled = _open_archive(file)
    try:
        loaded = _Unpickler(io.BytesIO(pickled)).load()
    except _RefusedError as error:
        raise UserError(
            f"{file} contains more than tensors: its pickle calls {error}, which was not run; use safetensors"
        ) from None
    except MemoryError:
        raise
    except Exception:  # pickle raises what it likes
        raise UserError(f"the pickle inside of {file} is corrupt: download the file again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file} holds a {type(loaded).__name__}, not a dictionary of tensors: save the state_dict")
    return {key: _locate(key, value, file, folder, members) for key, value in loaded.items()}


def _open_archive(file: Path) -> tuple[str, dict[str, zipfile.ZipInfo], bytes]:
    """Returns the folder in an archive, its members by name, and its pickle."""
    with file.open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                members = {info.filename: info for info in archive.infolist()}
                wanted = [name for name in members if name.endswith(("/data.pkl", "/byteorder"))]
                for info in map(members.__getitem__, wanted):
                    _check_stored(file, info)
                    if info.file_size > _MAX_PICKLE:
                        raise UserError(f"{file} describes its tensors in {info.file_size} bytes: download it again")
                read = {name: archive.read(name) for name in wanted}
        except UserError:
            raise
        except Exception:  # zipfile raises what it likes
            raise UserError(
                f"{file} is truncated or not in PyTorch's zip format: download it again, or save it again with PyTorch "
                "1.6 or newer"
            ) from None
    pickles = [name for name in wanted if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{file} holds no PyTorch checkpoint: its archive has {len(pickles)} files 'data.pkl'")
    folder = pickles[0].removesuffix("data.pkl")
    if read.get(folder + "byteorder", b"little") != b"little":
        raise UserError(f"{file} was written on a big-endian machine: save it again on a little-endian one")
    return folder, members, read[pickles[0]]


def _check_stored(file: Path, info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{file} is a compressed archive, which cannot be mapped: save it again with torch.save")


def _locate(key: Any, view: Any, file: Path, folder: str, members: dict[str, zipfile.ZipInfo]) -> StoredTensor:
    match view:
        case _View(_Storage(type_name, member, length), int(start), tuple(shape), tuple(strides)) if isinstance(
            key, str
        ):
            numbers = (start, *shape, *strides)
        case _:
            raise UserError(f"entry {key!r} of {file} is not a tensor: save the state_dict alone")
    dtype = file_type(type_name, _TYPES, key, file)
    itemsize = FILE_TYPES[dtype].itemsize
    info = members.get(f"{folder}data/{member}")
    inside = all(type(n) is int and n >= 0 for n in numbers) and start + math.prod(shape) <= length
    if info is None or not inside or len(shape) != len(strides) or info.file_size < length * itemsize:
        raise UserError(f"tensor '{key}' of {file} lies outside of its storage: download the file again")
    _check_stored(file, info)
    rows = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if any(size > 1 and stride != row for size, stride, row in zip(shape, strides, rows, strict=True)):
        raise UserError(f"tensor '{key}' of {file} is not stored row by row: save it after .contiguous()")
    return StoredTensor(key, file, dtype, shape, _data_start(file, info) + start * itemsize)


def _data_start(file: Path, info: zipfile.ZipInfo) -> int:
    """Finds where a member's bytes begin, in bytes: after the local header, whose length the directory does not say."""
    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{file} is corrupt: no entry of the archive at byte {info.header_offset}: download it again")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > file.stat().st_size:
        raise UserError(f"{file} is truncated inside of '{info.filename}': download it again")
    return start


class TorchWriter(AbstractContextManager["TorchWriter"]):
    """Writes one zip checkpoint that `torch.load(..., weights_only=True)` takes, tensors in the announced order."""

    def __init__(self, file: Path, shapes: dict[str, tuple[int, ...]], dtype: FileType):
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._folder, self._itemsize = file.stem, FILE_TYPES[dtype].itemsize
        self._waiting = list(enumerate(shapes.items()))
        self._member("data.pkl", [_pickle(shapes, dtype)])
        self._member("byteorder", [b"little"])

    def write(self, key: str, pieces: Iterable[UInt[np.ndarray, "..."]]) -> None:
        """Appends the next tensor, given as unsigned integers, a piece at a time."""
        number, (expected, shape) = self._waiting.pop(0)
        assert expected == key, (expected, key)
        size = self._member(f"data/{number}", (np.ascontiguousarray(piece).data.cast("B") for piece in pieces))
        assert size == math.prod(shape) * self._itemsize, key

    def _member(self, name: str, content: Iterable[bytes | memoryview]) -> int:
        # A fixed date, so that the same weights give the same file.
        info = zipfile.ZipInfo(f"{self._folder}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
        with self._archive.open(info, "w", force_zip64=True) as stream:
            return sum(map(stream.write, content))

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert not self._waiting, self._waiting
            self._member("version", [b"3\n"])
        self._archive.close()


def _pickle(shapes: dict[str, tuple[int, ...]], dtype: FileType) -> bytes:
    """Spells out the pickle of a dictionary of tensors, whose classes this process cannot import."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw

    def number(value: int) -> bytes:
        if value < 2**31:
            return pickle.BININT + struct.pack("<i", value)
        raw = pickle.encode_long(value)
        return pickle.LONG1 + bytes([len(raw)]) + raw

    def several(*parts: bytes) -> bytes:
        return pickle.MARK + b"".join(parts) + pickle.TUPLE

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    out = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT
    for index, (key, shape) in enumerate(shapes.items()):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = several(
            text("storage"), name("torch", _NAMES[dtype]), text(str(index)), text("cpu"), number(math.prod(shape))
        )
        tensor = several(
            storage + pickle.BINPERSID,
            number(0),
            several(*map(number, shape)),
            several(*map(number, strides)),
            pickle.NEWFALSE,
            name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
        )
        out += text(key) + name("torch._utils", "_rebuild_tensor_v2") + tensor + pickle.REDUCE + pickle.SETITEM
    return out + pickle.STOP
