"""Matrix products of Intel's oneMKL in XLA's programs for CPU, in float32.

Its products are faster than XLA's own, most where they are small, transposed or many. It takes parts of arrays by
address, so that nothing is cut out, padded or copied together: rows of one expert, one layer of a stack.

Threads are those of TBB, which do not spin while XLA computes.
"""

import ctypes
import functools
import importlib.metadata
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.foreign import Buffer, register
from mixtral_jax.precision import FULL

Products = Literal["xla", "mkl"]  # who multiplies matrices

Layer = Int[Array, ""] | Int[np.ndarray, ""]  # number of a layer; a constant of a program is the latter

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of CBLAS
LP64, TBB = 0, 3  # MKL_INTERFACE_LP64, MKL_THREADING_TBB
SIZE = 4  # bytes of an element


@functools.cache
def library() -> Any:
    """Loads the library and registers the products.

    Returns:
        The library, or None where the package `mkl` is not installed.
    """
    try:
        _load("tbb", "libtbb.so.")
        mkl = _load("mkl", "libmkl_rt.so")
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        return None
    mkl.MKL_Set_Interface_Layer(LP64)
    mkl.MKL_Set_Threading_Layer(TBB)
    matrix = [c_void_p, c_int]
    shape = [c_int] * 6
    mkl.cblas_sgemm.argtypes = [*shape, c_float, *matrix, *matrix, c_float, *matrix]
    strided = [c_void_p, c_int, c_int64]
    mkl.cblas_sgemm_batch_strided.argtypes = [*shape, c_float, *strided, *strided, c_float, *strided, c_int]
    mkl.cblas_sgemm_batch.argtypes = [c_int, *[c_void_p] * 13, c_int, c_void_p]
    for function in (mkl.cblas_sgemm, mkl.cblas_sgemm_batch_strided, mkl.cblas_sgemm_batch):
        function.restype = None
    for transposes in ("nn", "nt", "tn"):
        register(f"mkl_multiply_{transposes}", functools.partial(_multiply, mkl, transposes))
    register("mkl_add_product", functools.partial(_add_product, mkl))
    register("mkl_grouped_n", functools.partial(_grouped, mkl, PLAIN))
    register("mkl_grouped_t", functools.partial(_grouped, mkl, TRANSPOSED))
    register("mkl_grouped_add_t", functools.partial(_grouped_add, mkl))
    register("mkl_add_outer", functools.partial(_add_outer, mkl))
    return mkl


def _load(package: str, name: str) -> Any:
    files = importlib.metadata.files(package) or ()
    path = next(file for file in sorted(files) if file.name.startswith(name))
    return ctypes.CDLL(str(path.locate()), mode=ctypes.RTLD_GLOBAL)


def multiply(a: Array, b: Array, transposes: str = "nn") -> Array:
    """Computes a b, a b^T (`nt`) or a^T b (`tn`) of matrices, one by one over equal leading axes."""
    rows, columns = a.shape[-1 if transposes[0] == "t" else -2], b.shape[-2 if transposes[1] == "t" else -1]
    shape = jax.ShapeDtypeStruct((*a.shape[:-2], rows, columns), FULL)
    return jax.ffi.ffi_call(f"mkl_multiply_{transposes}", shape)(a, b)


def add_product(
    total: Float[Array, "inner outer"], a: Float[Array, "rows inner"], b: Float[Array, "rows outer"]
) -> Float[Array, "inner outer"]:
    """Computes total + a^T b, in the memory of `total` if nobody else needs it."""
    return jax.ffi.ffi_call("mkl_add_product", _like(total), input_output_aliases={2: 0})(a, b, total)


def grouped(
    rows: Float[Array, "rows inner"],
    group_sizes: Int[Array, " experts"],
    layer: Layer,
    stacks: Sequence[Float[Array, "layers experts a b"]],
    transposed: bool = False,
) -> list[Float[Array, "rows outer"]]:
    """Multiplies rows, sorted by expert, with their expert's matrix (or its transpose) in one layer of each stack.

    Rows of nobody, behind the last expert's, become zero.
    """
    outer = stacks[0].shape[2 if transposed else 3]
    shapes = [jax.ShapeDtypeStruct((rows.shape[0], outer), FULL)] * len(stacks)
    name = "mkl_grouped_t" if transposed else "mkl_grouped_n"
    return list(jax.ffi.ffi_call(name, shapes)(rows, group_sizes, layer, *stacks))


def grouped_add(
    total: Float[Array, "rows outer"], rows: Array, group_sizes: Array, layer: Layer, stack: Array
) -> Float[Array, "rows outer"]:
    """Adds `grouped` with transposed matrices to a total, in place."""
    call = jax.ffi.ffi_call("mkl_grouped_add_t", _like(total), input_output_aliases={4: 0})
    return call(rows, group_sizes, layer, stack, total)


def add_outer(
    stacks: Sequence[Float[Array, "layers experts inner outer"]],
    rows: Float[Array, "rows inner"],
    d_rows: Sequence[Float[Array, "rows outer"]],
    group_sizes: Int[Array, " experts"],
    layer: Layer,
) -> list[Float[Array, "layers experts inner outer"]]:
    """Adds rows^T d_rows of every expert to its matrix in one layer of each stack, in place."""
    count = len(stacks)
    aliases = {3 + count + i: i for i in range(count)}
    call = jax.ffi.ffi_call("mkl_add_outer", [_like(s) for s in stacks], input_output_aliases=aliases)
    return list(call(rows, group_sizes, layer, *d_rows, *stacks))


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _multiply(mkl: Any, transposes: str, a: Buffer, b: Buffer, out: Buffer) -> None:
    rows, columns = out.shape[-2:]
    inner = a.shape[-2 if transposes[0] == "t" else -1]
    flags = (ROW_MAJOR, *(TRANSPOSED if flag == "t" else PLAIN for flag in transposes))
    count = int(np.prod(out.shape[:-2]))
    mkl.cblas_sgemm_batch_strided(
        *flags, rows, columns, inner, 1.0,
        a.address, a.shape[-1], rows * inner, b.address, b.shape[-1], inner * columns,
        0.0, out.address, columns, rows * columns, count,
    )  # fmt: skip


def _add_product(mkl: Any, a: Buffer, b: Buffer, _: Buffer, out: Buffer) -> None:
    (rows, inner), outer = a.shape, b.shape[1]
    mkl.cblas_sgemm(ROW_MAJOR, TRANSPOSED, PLAIN, inner, outer, rows, 1.0, a.address, inner, b.address, outer,
                    1.0, out.address, outer)  # fmt: skip


def _grouped(
    mkl: Any, flag: int, rows: Buffer, group_sizes: Buffer, layer: Buffer, *stacks_and_outs: Buffer, add: bool = False
) -> None:
    count = len(stacks_and_outs) // 2
    stacks, outs = stacks_and_outs[:count], stacks_and_outs[count:]
    sizes, starts = _rows_of_experts(group_sizes)
    inner, outer = rows.shape[1], outs[0].shape[1]
    used = int(sizes.sum())
    for out in outs if not add else ():
        ctypes.memset(out.address + used * outer * SIZE, 0, (out.shape[0] - used) * outer * SIZE)
    _batch(
        mkl, PLAIN, flag, sizes, outer, inner, float(add),
        [rows.address + starts * inner * SIZE] * count, inner,
        [_of_layer(stack, layer) for stack in stacks], stacks[0].shape[3],
        [out.address + starts * outer * SIZE for out in outs], outer,
    )  # fmt: skip


def _grouped_add(
    mkl: Any, rows: Buffer, group_sizes: Buffer, layer: Buffer, stack: Buffer, _: Buffer, out: Buffer
) -> None:
    _grouped(mkl, TRANSPOSED, rows, group_sizes, layer, stack, out, add=True)


def _add_outer(mkl: Any, rows: Buffer, group_sizes: Buffer, layer: Buffer, *rest: Buffer) -> None:
    count = len(rest) // 3
    d_rows, outs = rest[:count], rest[2 * count :]
    sizes, starts = _rows_of_experts(group_sizes)
    inner, outer = rows.shape[1], d_rows[0].shape[1]
    _batch(
        mkl, TRANSPOSED, PLAIN, inner, outer, sizes, 1.0,
        [rows.address + starts * inner * SIZE] * count, inner,
        [d.address + starts * outer * SIZE for d in d_rows], outer,
        [_of_layer(out, layer) for out in outs], outer,
    )  # fmt: skip


def _rows_of_experts(group_sizes: Buffer) -> tuple[np.ndarray, np.ndarray]:
    values = (ctypes.c_int32 * group_sizes.shape[0]).from_address(group_sizes.address)
    sizes = np.array(values, np.int64)
    return sizes, np.cumsum(sizes) - sizes


def _of_layer(stack: Buffer, layer: Buffer) -> np.ndarray:
    """Addresses of the matrices of one layer."""
    number = ctypes.c_int32.from_address(layer.address).value
    _, experts, rows, columns = stack.shape
    return stack.address + (number * experts + np.arange(experts)) * rows * columns * SIZE


def _batch(
    mkl: Any, flag_a: int, flag_b: int, rows: Any, columns: Any, inner: Any, beta: float,
    a: list[np.ndarray], stride_a: int, b: list[np.ndarray], stride_b: int, out: list[np.ndarray], stride_out: int,
) -> None:  # fmt: skip
    """Computes products of many sizes at once; addresses in lists of one array over the experts."""
    count = len(a) * len(a[0])
    per_product = [
        np.full(count, flag_a, np.int32), np.full(count, flag_b, np.int32),
        *(np.tile(np.broadcast_to(size, len(a[0])), len(a)).astype(np.int32) for size in (rows, columns, inner)),
        np.ones(count, np.float32),
        np.concatenate(a).astype(np.uint64), np.full(count, stride_a, np.int32),
        np.concatenate(b).astype(np.uint64), np.full(count, stride_b, np.int32),
        np.full(count, beta, np.float32),
        np.concatenate(out).astype(np.uint64), np.full(count, stride_out, np.int32),
        np.ones(count, np.int32),
    ]  # fmt: skip
    *arrays, of_each = [array.ctypes.data for array in per_product]
    mkl.cblas_sgemm_batch(ROW_MAJOR, *arrays, count, of_each)
