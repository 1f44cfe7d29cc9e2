"""Matrix products that XLA's programs for CPU leave to functions of this process, in float32.

Those are faster than XLA's own, most where products are small, transposed or many. They take parts of arrays by
address, so that nothing is cut out, padded or copied together: rows of one expert, one layer of a stack.
"""

import functools
import os
import sys
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.cpu import amx, mkl
from mixtral_jax.precision import FULL

Engine = Literal["amx", "mkl"]
Products = Literal["xla", "amx", "mkl"]  # who multiplies matrices
ENGINES: tuple[Engine, ...] = ("amx", "mkl")  # the faster one first
NUMBERS = {engine: np.int64(number) for number, engine in enumerate(ENGINES)}  # for `matmul_calls`

Layer = Int[Array, ""] | Int[np.ndarray, ""]  # number of a layer; a constant of a program is the latter


@functools.cache
def available(engine: Engine) -> bool:
    """Says whether this machine has an engine, and makes it ready."""
    if not (sys.platform.startswith("linux") and {"amx": amx.load, "mkl": mkl.load}[engine]()):
        return False
    _register()
    return True


@functools.cache
def _register() -> None:
    from mixtral_jax.kernels.cpu import matmul_calls, thread_pool, xla_ffi

    thread_pool.prepare(len(os.sched_getaffinity(0)))
    xla_ffi.register("host_multiply", matmul_calls.multiply)
    xla_ffi.register("host_grouped", matmul_calls.grouped)
    xla_ffi.register("host_outer_products", matmul_calls.outer_products)


def is_multiply(target: str) -> bool:
    """Says whether a function of XLA's programs is `multiply`."""
    return target == "host_multiply"


def multiply(a: Array, b: Array, engine: Engine, transposes: str = "nn") -> Array:
    """Computes a b, a b^T (`nt`) or a^T b (`tn`) of matrices, one by one over equal leading axes."""
    turn_a, turn_b = (np.int64(flag == "t") for flag in transposes)
    rows, columns = a.shape[-1 if turn_a else -2], b.shape[-2 if turn_b else -1]
    call = jax.ffi.ffi_call("host_multiply", jax.ShapeDtypeStruct((*a.shape[:-2], rows, columns), FULL))
    return call(a, b, add=np.int64(0), engine=NUMBERS[engine], turn_a=turn_a, turn_b=turn_b)


def add_product(
    total: Float[Array, "inner outer"], a: Float[Array, "rows inner"], b: Float[Array, "rows outer"], engine: Engine
) -> Float[Array, "inner outer"]:
    """Computes total + a^T b, in the memory of `total` if nobody else needs it."""
    call = jax.ffi.ffi_call("host_multiply", _like(total), input_output_aliases={2: 0})
    return call(a, b, total, add=np.int64(1), engine=NUMBERS[engine], turn_a=np.int64(1), turn_b=np.int64(0))


def grouped(
    rows: Float[Array, "rows inner"],
    group_sizes: Int[Array, " experts"],
    layer: Layer,
    stacks: Sequence[Float[Array, "layers experts a b"]],
    engine: Engine,
    transposed: bool = False,
) -> list[Float[Array, "rows outer"]]:
    """Multiplies rows, sorted by expert, with their expert's matrix (or its transpose) in one layer of each stack.

    Rows of nobody, behind the last expert's, become zero.
    """
    outer = stacks[0].shape[2 if transposed else 3]
    shapes = [jax.ShapeDtypeStruct((rows.shape[0], outer), FULL)] * len(stacks)
    call = jax.ffi.ffi_call("host_grouped", shapes)
    engine_number, turn_b = NUMBERS[engine], np.int64(transposed)
    return list(call(rows, group_sizes, layer, *stacks, add=np.int64(0), engine=engine_number, turn_b=turn_b))


def grouped_add(
    total: Float[Array, "rows outer"], rows: Array, group_sizes: Array, layer: Layer, stack: Array, engine: Engine
) -> Float[Array, "rows outer"]:
    """Adds `grouped` with transposed matrices to a total, in place."""
    call = jax.ffi.ffi_call("host_grouped", [_like(total)], input_output_aliases={4: 0})
    engine_number = NUMBERS[engine]
    return call(rows, group_sizes, layer, stack, total, add=np.int64(1), engine=engine_number, turn_b=np.int64(1))[0]


def set_outer_products(
    stacks: Sequence[Float[Array, "layers experts inner outer"]],
    rows: Float[Array, "rows inner"],
    d_rows: Sequence[Float[Array, "rows outer"]],
    group_sizes: Int[Array, " experts"],
    layer: Layer,
    engine: Engine,
) -> list[Float[Array, "layers experts inner outer"]]:
    """Writes rows^T d_rows of every expert over its matrix in one layer of each stack, in place."""
    count = len(stacks)
    aliases = {3 + count + i: i for i in range(count)}
    call = jax.ffi.ffi_call("host_outer_products", [_like(s) for s in stacks], input_output_aliases=aliases)
    return list(call(rows, group_sizes, layer, *d_rows, *stacks, engine=NUMBERS[engine]))


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
