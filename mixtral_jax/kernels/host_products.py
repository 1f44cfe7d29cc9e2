"""Matrix products that XLA's programs for CPU leave to functions of this process, in float32.

Those are faster than XLA's own, most where products are small, transposed or many. They take parts of arrays by
address, so that nothing is cut out, padded or copied together: rows of one expert, one layer of a stack.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels import amx, mkl
from mixtral_jax.kernels.foreign import Buffer, register
from mixtral_jax.precision import FULL

Engine = Literal["amx", "mkl"]
Products = Literal["xla", "amx", "mkl"]  # who multiplies matrices

# Takes a table of products, see `_table`; whether the first and the second factors are transposed; and whether results
# are added to what is there.
Multiply = Callable[[np.ndarray, bool, bool, bool], None]

Layer = Int[Array, ""] | Int[np.ndarray, ""]  # number of a layer; a constant of a program is the latter

SIZE = 4  # bytes of an element


@functools.cache
def available(engine: Engine) -> bool:
    """Registers the products of an engine; says whether this machine has it."""
    multiply_all = {"amx": amx.load, "mkl": mkl.load}[engine]()
    if multiply_all is None:
        return False
    for transposes in ("nn", "nt", "tn"):
        register(f"{engine}_multiply_{transposes}", functools.partial(_multiply, multiply_all, transposes))
    register(f"{engine}_add_product", functools.partial(_add_product, multiply_all))
    register(f"{engine}_grouped_n", functools.partial(_grouped, multiply_all, False))
    register(f"{engine}_grouped_t", functools.partial(_grouped, multiply_all, True))
    register(f"{engine}_grouped_add_t", functools.partial(_grouped_add, multiply_all))
    register(f"{engine}_add_outer", functools.partial(_add_outer, multiply_all))
    return True


def is_multiply(target: str) -> bool:
    """Says whether a function of XLA's programs is `multiply`."""
    return "_multiply_" in target


def multiply(a: Array, b: Array, engine: Engine, transposes: str = "nn") -> Array:
    """Computes a b, a b^T (`nt`) or a^T b (`tn`) of matrices, one by one over equal leading axes."""
    rows, columns = a.shape[-1 if transposes[0] == "t" else -2], b.shape[-2 if transposes[1] == "t" else -1]
    shape = jax.ShapeDtypeStruct((*a.shape[:-2], rows, columns), FULL)
    return jax.ffi.ffi_call(f"{engine}_multiply_{transposes}", shape)(a, b)


def add_product(
    total: Float[Array, "inner outer"], a: Float[Array, "rows inner"], b: Float[Array, "rows outer"], engine: Engine
) -> Float[Array, "inner outer"]:
    """Computes total + a^T b, in the memory of `total` if nobody else needs it."""
    return jax.ffi.ffi_call(f"{engine}_add_product", _like(total), input_output_aliases={2: 0})(a, b, total)


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
    name = f"{engine}_grouped_t" if transposed else f"{engine}_grouped_n"
    return list(jax.ffi.ffi_call(name, shapes)(rows, group_sizes, layer, *stacks))


def grouped_add(
    total: Float[Array, "rows outer"], rows: Array, group_sizes: Array, layer: Layer, stack: Array, engine: Engine
) -> Float[Array, "rows outer"]:
    """Adds `grouped` with transposed matrices to a total, in place."""
    call = jax.ffi.ffi_call(f"{engine}_grouped_add_t", _like(total), input_output_aliases={4: 0})
    return call(rows, group_sizes, layer, stack, total)


def add_outer(
    stacks: Sequence[Float[Array, "layers experts inner outer"]],
    rows: Float[Array, "rows inner"],
    d_rows: Sequence[Float[Array, "rows outer"]],
    group_sizes: Int[Array, " experts"],
    layer: Layer,
    engine: Engine,
) -> list[Float[Array, "layers experts inner outer"]]:
    """Adds rows^T d_rows of every expert to its matrix in one layer of each stack, in place."""
    count = len(stacks)
    aliases = {3 + count + i: i for i in range(count)}
    call = jax.ffi.ffi_call(f"{engine}_add_outer", [_like(s) for s in stacks], input_output_aliases=aliases)
    return list(call(rows, group_sizes, layer, *d_rows, *stacks))


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _multiply(multiply_all: Multiply, transposes: str, a: Buffer, b: Buffer, out: Buffer) -> None:
    rows, columns = out.shape[-2:]
    turn_a, turn_b = (flag == "t" for flag in transposes)
    inner = a.shape[-2 if turn_a else -1]
    each = np.arange(int(np.prod(out.shape[:-2])), dtype=np.int64) * SIZE
    table = _table(
        (a.address + each * rows * inner, a.shape[-1]),
        (b.address + each * inner * columns, b.shape[-1]),
        (out.address + each * rows * columns, columns),
        rows, columns, inner,
    )  # fmt: skip
    multiply_all(table, turn_a, turn_b, False)


def _add_product(multiply_all: Multiply, a: Buffer, b: Buffer, _: Buffer, out: Buffer) -> None:
    (rows, inner), outer = a.shape, b.shape[1]
    table = _table((np.array([a.address]), inner), (b.address, outer), (out.address, outer), inner, outer, rows)
    multiply_all(table, True, False, True)


def _grouped(
    multiply_all: Multiply,
    transposed: bool,
    rows: Buffer,
    group_sizes: Buffer,
    layer: Buffer,
    *stacks_and_outs: Buffer,
    add: bool = False,
) -> None:
    count = len(stacks_and_outs) // 2
    stacks, outs = stacks_and_outs[:count], stacks_and_outs[count:]
    sizes, starts = _rows_of_experts(group_sizes)
    inner, outer = rows.shape[1], outs[0].shape[1]
    used = int(sizes.sum())
    for out in outs if not add else ():
        ctypes.memset(out.address + used * outer * SIZE, 0, (out.shape[0] - used) * outer * SIZE)
    tables = [
        _table(
            (rows.address + starts * inner * SIZE, inner),
            (_of_layer(stack, layer), stack.shape[3]),
            (out.address + starts * outer * SIZE, outer),
            sizes, outer, inner,
        )
        for stack, out in zip(stacks, outs, strict=True)
    ]  # fmt: skip
    multiply_all(np.concatenate(tables), False, transposed, add)


def _grouped_add(
    multiply_all: Multiply, rows: Buffer, group_sizes: Buffer, layer: Buffer, stack: Buffer, _: Buffer, out: Buffer
) -> None:
    _grouped(multiply_all, True, rows, group_sizes, layer, stack, out, add=True)


def _add_outer(multiply_all: Multiply, rows: Buffer, group_sizes: Buffer, layer: Buffer, *rest: Buffer) -> None:
    count = len(rest) // 3
    d_rows, outs = rest[:count], rest[2 * count :]
    sizes, starts = _rows_of_experts(group_sizes)
    inner, outer = rows.shape[1], d_rows[0].shape[1]
    tables = [
        _table(
            (rows.address + starts * inner * SIZE, inner),
            (d.address + starts * outer * SIZE, outer),
            (_of_layer(out, layer), outer),
            inner, outer, sizes,
        )
        for d, out in zip(d_rows, outs, strict=True)
    ]  # fmt: skip
    multiply_all(np.concatenate(tables), True, False, True)


def _rows_of_experts(group_sizes: Buffer) -> tuple[np.ndarray, np.ndarray]:
    sizes = group_sizes.array(np.int32).astype(np.int64)
    return sizes, np.cumsum(sizes) - sizes


def _of_layer(stack: Buffer, layer: Buffer) -> np.ndarray:
    """Addresses of the matrices of one layer."""
    number = int(layer.array(np.int32))
    _, experts, rows, columns = stack.shape
    return stack.address + (number * experts + np.arange(experts)) * rows * columns * SIZE


def _table(a: Any, b: Any, out: Any, rows: Any, columns: Any, inner: Any) -> np.ndarray:
    """Lists products: addresses of both factors and the result, elements from a row to the next, and sizes.

    Args:
        a: addresses of the first factors, as an array; elements from a row to the next.
        b: second factors.
        out: results.
        rows: of the results.
        columns: of the results.
        inner: length of the sums. A product in which any size is zero is left out.

    Returns:
        int64 [products, 9].
    """
    columns_of_table = (a[0], b[0], out[0], a[1], b[1], out[1], rows, columns, inner)
    table = np.stack([np.broadcast_to(x, len(a[0])) for x in columns_of_table], axis=1).astype(np.int64)
    return table[table[:, 6:].all(axis=1)]
