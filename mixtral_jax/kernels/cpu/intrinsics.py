"""Python that Numba compiles to functions of the processor alone, and what such functions need of memory and threads.

Addresses are integers, and so are functions, which take and return one integer.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
from llvmlite import binding, ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba import carray, cfunc, from_dtype, njit, types
from numba import config as numba_config
from numba.core import caching, cgutils
from numba.core.types import Type
from numba.core.typing.context import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from mixtral_jax.whole_files import sealed, unsealed, write_whole

OPTIONS: Any = {"cache": True, "error_model": "numpy", "fastmath": {"contract"}}
NUMBER, REAL = types.int64, from_dtype(np.dtype(np.float32))
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
STATE = "mixtral_jax_state"
CACHES = "MIXTRAL_JAX_CACHE_DIR"  # environment: `data.cache_dir`, for where these sources may not be written
# Places in `state`: of threads and their workspaces, see `thread_pool`; of functions' addresses.
THREADS, SLOTS, FLAGS, WORKSPACES, CONFIGURATIONS = range(5)
AMX, MKL, SGEMM_BATCH, MULTIPLY, ATTEND, DIFFERENTIATE, UPDATE, SUM_SQUARES, SOFTMAX, SWIGLU = range(8, 18)
MKL_BLOCKS, STORED = range(18, 20)
settings: Any = numba_config  # Numba makes its attributes when it is imported
numba_caching: Any = caching

# Addresses and numbers of this process, which may not stand in compiled functions: these are kept on disk.
state = np.zeros(64, np.int64)
binding.add_symbol(STATE, state.ctypes.data)

allocate = types.ExternalFunction("aligned_alloc", NUMBER(NUMBER, NUMBER))
release = types.ExternalFunction("free", types.void(NUMBER))
fill = types.ExternalFunction("memset", NUMBER(NUMBER, types.int32, NUMBER))
current_processor = types.ExternalFunction("sched_getcpu", types.int32())


log = logging.getLogger(__name__)
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
    before, folder, files = settings.CACHE_DIR, _cache(), numba_caching.IndexDataCacheFile
    settings.CACHE_DIR, numba_caching.IndexDataCacheFile = folder, _Files
    try:
        return compile_function()
    finally:
        settings.CACHE_DIR, numba_caching.IndexDataCacheFile = before, files


class _Files(caching.IndexDataCacheFile):  # type: ignore[misc]
    """Numba's files with checksums: it runs what is damaged, or ends every start with a trace.

    A checksum behind what it has pickled is nothing to it.
    """

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content
        write_whole(Path(filepath), sealed(content.getvalue()), durable=False)

    def load(self, key: Any) -> Any:
        _remove_damaged(self._index_path)
        if name := self._load_index().get(key):
            _remove_damaged(self._data_path(name))
        return super().load(key)


def _remove_damaged(file: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if unsealed(Path(file).read_bytes()) is None:
            log.warning("%s is damaged: the kernel is compiled again", file)
            os.unlink(file)


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


def pointer(builder: Builder, address: Value, kind: ir.Type = I8) -> Value:
    """Makes an address a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def emits(result: Type = types.void, **kinds: Type | None) -> Callable[[Callable[..., Value | None]], Any]:
    """Makes a function for compiled Python of one that writes LLVM's instructions.

    Args:
        result: the type of what the instructions give.
        kinds: types of arguments by name, None for any; others are `NUMBER`, unless they are annotated as numbers of
            Python's, which must be known when the caller is compiled.
    """

    def decorate(write: Callable[..., Value | None]) -> Any:
        arguments = [*inspect.signature(write).parameters.values()][1:]
        known = [argument.annotation if argument.annotation in (int, bool) else None for argument in arguments]
        wanted = [kinds.get(argument.name, NUMBER) for argument in arguments]

        @functools.wraps(write)
        def define(_: BaseContext, *given: Any) -> tuple[Signature, Callable[..., Value]]:
            numbers = [make and make(kind.literal_value) for make, kind in zip(known, given, strict=True)]
            taken = [kind if make else want or kind for make, want, kind in zip(known, wanted, given, strict=True)]

            def generate(context: Any, b: Builder, _: Signature, values: Sequence[Value]) -> Value:
                passed = (n if make else v for make, n, v in zip(known, numbers, values, strict=True))
                written = write(b, *passed)
                return context.get_dummy_value() if written is None else written

            return result(*taken), generate

        return intrinsic(prefer_literal=any(known))(define)

    return decorate


@emits(NUMBER)
def read(b: Builder, address: Value) -> Value:
    """Reads an integer of 8 bytes."""
    return b.load(pointer(b, address, I64))


@emits(NUMBER)
def read_short(b: Builder, address: Value) -> Value:
    """Reads an integer of 4 bytes."""
    return b.sext(b.load(pointer(b, address, I32)), I64)


@emits()
def write(b: Builder, address: Value, value: Value) -> None:
    """Writes an integer of 8 bytes."""
    b.store(value, pointer(b, address, I64))


@emits()
def write_short(b: Builder, address: Value, value: Value) -> None:
    """Writes an integer of 4 bytes."""
    b.store(b.trunc(value, I32), pointer(b, address, I32))


@emits(types.voidptr)
def _pointer(b: Builder, address: Value) -> Value:
    return pointer(b, address)


@compiled
@no_type_check
def view(address: int, rows: int, columns: int, dtype: Any) -> np.ndarray:
    """Shows memory as an array."""
    return carray(_pointer(address), (rows, columns), dtype)


@emits(NUMBER)
def read_state(b: Builder, place: Value) -> Value:
    """Reads an entry of `state`."""
    table = b.module.globals.get(STATE) or ir.GlobalVariable(b.module, I64, STATE)
    return b.load(b.gep(table, [place]))


@emits(NUMBER, arguments=None)
def call(b: Builder, function: Value, arguments: Value) -> Value:
    """Calls what lies at an address with a tuple of integers, some of which may be narrower there."""
    values = cgutils.unpack_tuple(b, arguments)
    return b.call(pointer(b, function, ir.FunctionType(I64, [I64] * len(values))), values)


@emits(NUMBER)
def exchange(b: Builder, address: Value, value: Value) -> Value:
    """Writes an integer and gives what was there, at once."""
    return b.atomic_rmw("xchg", pointer(b, address, I64), value, "seq_cst")


@emits(NUMBER)
def read_counter(b: Builder, counter: Value) -> Value:
    """Reads what another thread may raise, and then what that one wrote before."""
    return b.load_atomic(pointer(b, counter, I64), "acquire", 8)


@emits(NUMBER)
def add_to_counter(b: Builder, counter: Value, value: Value) -> Value:
    """Adds to a counter, after everything that was written before; gives what it was."""
    return b.atomic_rmw("add", pointer(b, counter, I64), value, "seq_cst")


@emits()
def pause(b: Builder) -> None:
    """Tells the processor that this thread waits."""
    b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])


@emits()
def give_way(b: Builder) -> None:
    """Lets other threads have this one's processor."""
    b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])
