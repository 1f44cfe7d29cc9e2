"""Compiled functions that XLA's programs for CPU call by its foreign function interface, and what they are called with.

Offsets are those of `xla/ffi/api/c_api.h`, which jaxlib brings along; XLA keeps them compatible within a version of the
interface and refuses a function that names one it does not know.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import jax

from mixtral_jax.kernels.cpu.intrinsics import call, compiled, entry, read, read_short, write, write_short

VERSION = (0, 3)
METADATA = 1  # XLA_FFI_Extension_Metadata
# XLA_FFI_CallFrame
EXTENSION, API, CONTEXT, OPERAND_COUNT, OPERANDS, RESULT_COUNT, RESULTS, ATTRIBUTES = 8, 16, 24, 56, 72, 96, 112, 160
DATA, RANK, DIMS = 24, 32, 40  # XLA_FFI_Buffer
VALUE = 8  # XLA_FFI_Scalar
EXTENSION_TYPE, EXTENSION_METADATA = 8, 24  # XLA_FFI_Metadata_Extension
MAJOR, MINOR, TRAITS = 24, 28, 32  # XLA_FFI_Metadata
ERROR_DESTROY, SCHEDULE = 64, 136  # XLA_FFI_Api
SCHEDULE_SIZE, DESTROY_SIZE = 40, 24  # bytes of XLA_FFI_ThreadPool_Schedule_Args and XLA_FFI_Error_Destroy_Args


def register(name: str, function: Callable[[int], int]) -> None:
    """Makes a function callable by `jax.ffi.ffi_call(name, ...)` in programs for CPU.

    Args:
        name: of the target, unique in the process.
        function: takes the address of a frame, which the functions below read, and returns 0.
    """
    handler = entry(function)
    _registered.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.ctypes), platform="cpu", api_version=1)


_registered: list[Any] = []  # XLA keeps addresses only


@compiled
@no_type_check
def answer_version_query(frame: int) -> bool:
    """Answers if this is no call but XLA's question for the version, and says whether it was."""
    extension = read(frame + EXTENSION)
    if extension == 0 or read_short(extension + EXTENSION_TYPE) != METADATA:
        return False
    metadata = read(extension + EXTENSION_METADATA)
    write_short(metadata + MAJOR, VERSION[0])
    write_short(metadata + MINOR, VERSION[1])
    write_short(metadata + TRAITS, 0)
    return True


@compiled
@no_type_check
def operand(frame: int, i: int) -> int:
    """Finds the buffer of an operand."""
    return read(read(frame + OPERANDS) + 8 * i)


@compiled
@no_type_check
def result(frame: int, i: int) -> int:
    """Finds the buffer of a result."""
    return read(read(frame + RESULTS) + 8 * i)


@compiled
@no_type_check
def count_operands(frame: int) -> int:
    """Counts the operands."""
    return read(frame + OPERAND_COUNT)


@compiled
@no_type_check
def count_results(frame: int) -> int:
    """Counts the results."""
    return read(frame + RESULT_COUNT)


@compiled
@no_type_check
def attribute(frame: int, i: int) -> int:
    """Reads an attribute, an int64; they are in the order of their names."""
    return read(read(read(read(frame + ATTRIBUTES) + 8 * i) + VALUE))


@compiled
@no_type_check
def data(buffer: int) -> int:
    """Address of the memory of a buffer; it is there during the call alone."""
    return read(buffer + DATA)


@compiled
@no_type_check
def rank(buffer: int) -> int:
    """Counts the dimensions."""
    return read(buffer + RANK)


@compiled
@no_type_check
def dim(buffer: int, i: int) -> int:
    """Length of a dimension, of the last one for -1."""
    return read(read(buffer + DIMS) + 8 * (i if i >= 0 else rank(buffer) + i))


@compiled
@no_type_check
def elements(buffer: int) -> int:
    """Counts the elements."""
    product = 1
    for i in range(rank(buffer)):
        product *= dim(buffer, i)
    return product


@compiled
@no_type_check
def schedule(frame: int, function: int, argument: int, memory: int) -> bool:
    """Has a function called by a thread of XLA's, one day; says whether it will be.

    Args:
        frame: of the call in which this happens.
        function: its address.
        argument: what it is called with.
        memory: address of 64 bytes.
    """
    write(memory, SCHEDULE_SIZE)
    write(memory + 8, 0)
    write(memory + 16, read(frame + CONTEXT))
    write(memory + 24, function)
    write(memory + 32, argument)
    error = call(read(read(frame + API) + SCHEDULE), (memory,))
    if error == 0:
        return True
    write(memory, DESTROY_SIZE)
    write(memory + 16, error)
    call(read(read(frame + API) + ERROR_DESTROY), (memory,))
    return False
