"""Python that Numba compiles to functions of the processor alone, and what such functions need of memory and threads.

Addresses are integers, and so are functions, which take and return one integer.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, from_dtype, njit, types
from numba import config as numba_config
from numba.core import cgutils
from numba.extending import intrinsic

OPTIONS: Any = {"cache": True, "error_model": "numpy", "fastmath": {"contract"}}
NUMBER, REAL = types.int64, from_dtype(np.dtype(np.float32))
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
STATE = "mixtral_jax_state"
CACHES = "MIXTRAL_JAX_CACHE_DIR"  # environment: `data.cache_dir`, for where these sources may not be written
# Places in `state`: of threads and their workspaces, see `thread_pool`; of functions' addresses.
THREADS, SLOTS, FLAGS, WORKSPACES, CONFIGURATIONS = range(5)
AMX, MKL, SGEMM_BATCH, MULTIPLY, ATTEND, DIFFERENTIATE, UPDATE, SUM_SQUARES, SOFTMAX, SWIGLU = range(8, 18)
settings: Any = numba_config  # Numba makes its attributes when it is imported
Builder = Any
Code = tuple[Any, Callable[..., Any]]  # a signature, and what writes LLVM's instructions

# Addresses and numbers of this process, which may not stand in compiled functions: these are kept on disk.
state = np.zeros(64, np.int64)
binding.add_symbol(STATE, state.ctypes.data)

allocate = types.ExternalFunction("aligned_alloc", NUMBER(NUMBER, NUMBER))
release = types.ExternalFunction("free", types.void(NUMBER))
fill = types.ExternalFunction("memset", NUMBER(NUMBER, types.int32, NUMBER))
current_processor = types.ExternalFunction("sched_getcpu", types.int32())


_held: list[Any] = []  # for as long as the process lives


@functools.cache
def _cache() -> str:
    """A directory for compiled functions that no other version of these sources has; Numba looks at one file alone."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:16]
    places = [settings.CACHE_DIR or folder / "__pycache__", os.environ.get(CACHES),
              f"{os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')}/mixtral_jax"]  # fmt: skip
    for place in filter(None, places):
        directory = Path(place).absolute() / f"compiled-{digest}"
        # Code may be read-only, and a user without a home.
        with contextlib.suppress(OSError):
            if not str(place).startswith("~"):
                directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=directory).close()
                return str(directory)
    _held.append(tempfile.TemporaryDirectory(prefix="mixtral_jax-"))  # removed when the process ends
    return str(_held[-1].name)


def _kept(compile_function: Callable[[], Any]) -> Any:
    """Compiles while Numba looks for what it has compiled in `_cache`."""
    before, folder = settings.CACHE_DIR, _cache()
    settings.CACHE_DIR = folder
    try:
        return compile_function()
    finally:
        settings.CACHE_DIR = before


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a function when it is first called, and keeps it on disk."""
    return _kept(lambda: njit(nogil=True, **OPTIONS)(function))


def entry(function: Callable[[int], int]) -> Any:
    """Compiles a function that others call by its address, an integer for an integer; keeps it on disk."""
    return _kept(lambda: cfunc(NUMBER(NUMBER), **OPTIONS)(function))


def set_state(place: int, value: Any) -> None:
    """Sets an entry of `state`, to a number or to the address of a function, which becomes an `entry`."""
    if callable(value):
        _held.append(entry(value))
        value = _held[-1].address
    state[place] = value


def pointer(builder: Builder, address: Any, kind: Any = I8) -> Any:
    """Makes an address a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def returns_nothing(write: Callable[..., None], *arguments: Any) -> Code:
    """Makes an intrinsic of a function that writes code for its arguments."""

    def generate(context: Any, builder: Builder, _: Any, values: Any) -> Any:
        write(builder, *values)
        return context.get_dummy_value()

    return types.void(*arguments), generate


def returns_number(write: Callable[..., Any], *arguments: Any) -> Code:
    """Makes an intrinsic of a function that writes code for its arguments and gives an integer."""
    return NUMBER(*arguments), lambda _, builder, __, values: write(builder, *values)


@intrinsic
def read(_: Any, address: Any) -> Code:
    """Reads an integer of 8 bytes."""
    return returns_number(lambda b, address: b.load(pointer(b, address, I64)), NUMBER)


@intrinsic
def read_short(_: Any, address: Any) -> Code:
    """Reads an integer of 4 bytes."""
    return returns_number(lambda b, address: b.sext(b.load(pointer(b, address, I32)), I64), NUMBER)


@intrinsic
def write(_: Any, address: Any, value: Any) -> Code:
    """Writes an integer of 8 bytes."""
    return returns_nothing(lambda b, address, value: b.store(value, pointer(b, address, I64)), NUMBER, NUMBER)


@intrinsic
def write_short(_: Any, address: Any, value: Any) -> Code:
    """Writes an integer of 4 bytes."""

    def generate(b: Builder, address: Any, value: Any) -> None:
        b.store(b.trunc(value, I32), pointer(b, address, I32))

    return returns_nothing(generate, NUMBER, NUMBER)


@intrinsic
def _pointer(_: Any, address: Any) -> Code:
    return types.voidptr(NUMBER), lambda _, b, __, values: pointer(b, values[0])


@compiled
@no_type_check
def view(address: int, rows: int, columns: int, dtype: Any) -> np.ndarray:
    """Shows memory as an array."""
    return carray(_pointer(address), (rows, columns), dtype)


@intrinsic
def read_state(_: Any, place: Any) -> Code:
    """Reads an entry of `state`."""

    def generate(b: Builder, place: Any) -> Any:
        table = b.module.globals.get(STATE) or ir.GlobalVariable(b.module, I64, STATE)
        return b.load(b.gep(table, [place]))

    return returns_number(generate, NUMBER)


@intrinsic
def call(_: Any, function: Any, arguments: Any) -> Code:
    """Calls what lies at an address with a tuple of integers, some of which may be narrower there."""

    def generate(b: Builder, function: Any, arguments: Any) -> Any:
        values = cgutils.unpack_tuple(b, arguments)
        return b.call(pointer(b, function, ir.FunctionType(I64, [I64] * len(values))), values)

    return returns_number(generate, NUMBER, arguments)


@intrinsic
def exchange(_: Any, address: Any, value: Any) -> Code:
    """Writes an integer and gives what was there, at once."""

    def generate(b: Builder, address: Any, value: Any) -> Any:
        return b.atomic_rmw("xchg", pointer(b, address, I64), value, "seq_cst")

    return returns_number(generate, NUMBER, NUMBER)


@intrinsic
def read_counter(_: Any, counter: Any) -> Code:
    """Reads what another thread may raise, and then what that one wrote before."""
    return returns_number(lambda b, counter: b.load_atomic(pointer(b, counter, I64), "acquire", 8), NUMBER)


@intrinsic
def add_to_counter(_: Any, counter: Any, value: Any) -> Code:
    """Adds to a counter, after everything that was written before; gives what it was."""

    def generate(b: Builder, counter: Any, value: Any) -> Any:
        return b.atomic_rmw("add", pointer(b, counter, I64), value, "seq_cst")

    return returns_number(generate, NUMBER, NUMBER)


@intrinsic
def pause(_: Any) -> Code:
    """Tells the processor that this thread waits."""

    def generate(b: Builder) -> None:
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])

    return returns_nothing(generate)


@intrinsic
def give_way(_: Any) -> Code:
    """Lets other threads have this one's processor."""

    def generate(b: Builder) -> None:
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])

    return returns_nothing(generate)
