"""Python functions that XLA's programs for CPU call by its foreign function interface, made with ctypes.

The structures are those of `xla/ffi/api/c_api.h`, which jaxlib brings along; XLA keeps them compatible within a version
of the interface and refuses a function that names one it does not know.
"""

import ctypes
import math
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, NamedTuple

import jax
import numpy as np

API_VERSION = (0, 3)
METADATA, INTERNAL = 1, 13  # XLA_FFI_Extension_Metadata, XLA_FFI_Error_Code_INTERNAL
HEAD: Any = (("struct_size", c_size_t), ("extension", c_void_p))


class Version(ctypes.Structure):
    """XLA_FFI_Api_Version."""

    _fields_ = [*HEAD, ("major", c_int), ("minor", c_int)]


class Metadata(ctypes.Structure):
    """XLA_FFI_Metadata: what a function says about itself when XLA asks."""

    _fields_ = [("struct_size", c_size_t), ("version", Version), ("traits", c_uint32), ("state", c_int64)]


class MetadataExtension(ctypes.Structure):
    """XLA_FFI_Metadata_Extension: the question for the metadata, in place of a call."""

    _fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(Metadata))]


class CBuffer(ctypes.Structure):
    """XLA_FFI_Buffer."""

    _fields_ = [*HEAD, ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class Buffers(ctypes.Structure):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = [*HEAD, ("size", c_int64), ("types", c_void_p), ("items", POINTER(POINTER(CBuffer)))]


class Api(ctypes.Structure):
    """The beginning of XLA_FFI_Api."""

    _fields_ = [*HEAD, ("version", Version), ("internal", c_void_p), ("create_error", c_void_p)]


class CallFrame(ctypes.Structure):
    """XLA_FFI_CallFrame up to the results."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", POINTER(MetadataExtension)),
        ("api", POINTER(Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("operands", Buffers),
        ("results", Buffers),
    ]


class ErrorArguments(ctypes.Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = [*HEAD, ("message", c_char_p), ("code", c_int)]


HANDLER = ctypes.CFUNCTYPE(c_void_p, POINTER(CallFrame))
CREATE_ERROR = ctypes.CFUNCTYPE(c_void_p, POINTER(ErrorArguments))
_registered: list[Any] = []  # XLA keeps addresses only


class Buffer(NamedTuple):
    """Memory of an operand or a result; it is there during the call alone."""

    address: int
    shape: tuple[int, ...]

    def array(self, dtype: type[np.generic]) -> np.ndarray:
        """Shows the memory as an array, without a copy."""
        size = math.prod(self.shape) * np.dtype(dtype).itemsize
        memory: Any = (ctypes.c_char * size).from_address(self.address)
        return np.ndarray(self.shape, dtype, memory)


def register(name: str, function: Callable[..., None]) -> None:
    """Makes a function callable by `jax.ffi.ffi_call(name, ...)` in programs for CPU.

    Args:
        name: of the target, unique in the process.
        function: takes one `Buffer` for each operand and then for each result, which it fills. What it raises becomes
            the error of XLA's program.
    """

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        try:
            if frame.extension and frame.extension.contents.type == METADATA:
                metadata = frame.extension.contents.metadata.contents
                metadata.version.major, metadata.version.minor = API_VERSION
                metadata.traits = 0
                return None
            function(*_buffers(frame.operands), *_buffers(frame.results))
        except Exception as error:  # beyond this frame there is no Python
            text = f"{name}: {error!r}".encode()
            arguments = ErrorArguments(ctypes.sizeof(ErrorArguments), None, text, INTERNAL)
            return CREATE_ERROR(frame.api.contents.create_error)(arguments)
        return None

    handler = HANDLER(handle)
    _registered.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu", api_version=1)


def _buffers(array: Any) -> list[Buffer]:
    found = (array.items[i].contents for i in range(array.size))
    return [Buffer(b.data or 0, tuple(b.dims[: b.rank])) for b in found]
