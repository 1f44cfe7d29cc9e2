"""What the bfloat16 matrix units (AMX) of x86 processors take and give, as functions for Numba: tiles and their making.

A float32 number is nearly the sum of two bfloat16 numbers, `high` and `low`, so a product of two is nearly
high high + high low + low high, each exact in the unit and summed in float32. The error is about 4e-6 of the factors'
norms: ten times float32's own, a hundredth of TF32's. Source: arXiv 1904.06376.

A tile is 16 rows of 64 bytes. Factors are cut into tiles of 16 rows or columns by 32 of the inner dimension, in the
order in which the unit reads them: pairs along the inner dimension lie together. A pair is elements i and i + 16 of 32,
which both factors agree on and which takes no shuffles.
"""

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from mixtral_jax.kernels.cpu.intrinsics import I8, I32, I64, Builder, Value, compiled, emits, pointer
from mixtral_jax.kernels.cpu.simd import FLOATS, INTS, copy_row, load_vector, shuffle, splat, store_vector

TILE, STEP = 1024, 4096  # bytes of a tile, and of the high and low tiles of 32 rows or columns

UPPER = 0xFFFF0000


def make_configurations() -> np.ndarray:
    """Describes the unit's tiles for every number of rows up to 32; those behind the 16th are in tiles 2, 3 and 5.

    Returns:
        uint8 [33, 64]. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, LDTILECFG.
    """
    table = np.zeros((33, 64), np.uint8)
    for rows in range(1, 33):
        first, second = min(rows, 16), max(rows - 16, 1)
        table[rows, 0] = 1  # palette
        table[rows, 16:32].view(np.uint16)[:] = 64  # bytes of a row
        table[rows, 48:56] = [first, first, second, second, first, second, 16, 16]
    return table


def emit(builder: Builder, name: str, *arguments: Value) -> None:
    """Calls an instruction of x86."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


@emits()
def configure(b: Builder, address: Value) -> None:
    """Sets the shapes of all tiles."""
    emit(b, "ldtilecfg", pointer(b, address))


@emits()
def release(b: Builder) -> None:
    """Gives the tiles back."""
    emit(b, "tilerelease")


@emits()
def clear(b: Builder, tile: int) -> None:
    """Makes a tile zero."""
    emit(b, "tilezero", I8(tile))


@emits()
def load(b: Builder, tile: int, address: Value, stride: Value) -> None:
    """Reads a tile whose rows lie `stride` bytes apart."""
    emit(b, "tileloadd64", I8(tile), pointer(b, address), stride)


@emits()
def store(b: Builder, tile: int, address: Value, stride: Value) -> None:
    """Writes a tile."""
    emit(b, "tilestored64", I8(tile), pointer(b, address), stride)


@emits()
def dot(b: Builder, total: int, left: int, right: int) -> None:
    """Adds the product of two tiles to a third."""
    emit(b, "tdpbf16ps", I8(total), I8(left), I8(right))


@emits()
def clear_element(b: Builder, target: Value) -> None:
    """Makes four bytes zero."""
    b.store(I32(0), pointer(b, target, I32))


def split(b: Builder, x: Value) -> tuple[Value, Value]:
    """Finds the high and the low part of floats, each in the upper halves of integers; below them lies anything."""

    def high_of(x: Value) -> Value:  # what is half way goes away from zero
        return b.add(b.bitcast(x, INTS), splat(INTS, 0x8000))

    high = b.and_(high_of(x), splat(INTS, UPPER))
    return high, high_of(b.fsub(x, b.bitcast(high, FLOATS)))


def pair(b: Builder, x: Value, y: Value) -> Value:
    """Puts the upper halves of x and of y together, those of x below."""
    return b.or_(b.and_(y, splat(INTS, UPPER)), b.lshr(x, splat(INTS, 16)))


def transpose(b: Builder, rows: list[Value]) -> list[Value]:
    """Exchanges rows and columns of 16 x 16 integers: of ever smaller squares, those off the diagonal change places."""
    rows = list(rows)
    for size in (8, 4, 2, 1):
        for i in (i for i in range(16) if not i & size):
            x, y = rows[i], rows[i + size]
            rows[i] = shuffle(b, x, y, [16 + j - size if j & size else j for j in range(16)])
            rows[i + size] = shuffle(b, x, y, [16 + j if j & size else j + size for j in range(16)])
    return rows


def fetch(b: Builder, address: Value) -> None:
    """Asks for 64 bytes to be brought to the L2 cache."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    b.call(
        cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0"),
        [pointer(b, address), I32(0), I32(2), I32(1)],  # to read, into L2, data
    )


@emits()
def split_tile(b: Builder, source: Value, stride: Value, target: Value, inner_last: bool, transposed: bool) -> None:
    """Turns floats, [16, 32] with the inner dimension last or [32, 16], into a high and, two tiles on, a low tile."""
    behind = b.add(source, I64(64) if inner_last else b.mul(stride, I64(16)))
    ahead = b.mul(stride, I64(16))
    parts: tuple[list[Value], list[Value]] = ([], [])
    for row in range(16):
        offset = b.mul(stride, I64(row))
        x, y = (split(b, load_vector(b, b.add(start, offset))) for start in (source, behind))
        if inner_last:  # the next 16 rows are far away, and the processor does not ask for so many by itself
            fetch(b, b.add(b.add(source, offset), ahead))
            fetch(b, b.add(b.add(behind, offset), ahead))
        for part, of_x, of_y in zip(parts, x, y, strict=True):
            part.append(pair(b, of_x, of_y))
    for part, offset in zip(parts, (0, 2 * TILE), strict=True):
        for row, pairs in enumerate(transpose(b, part) if transposed else part):
            store_vector(b, pairs, target, offset + 64 * row)


@emits()
def split_rows(b: Builder, x: Value, y: Value, target: Value, panels: Value, step: Value) -> None:
    """Turns two rows of panels of 32 floats, elements i and i + 16 of the inner dimension, into rows of tiles."""
    with cgutils.for_range(b, panels) as loop:
        source, place = b.shl(loop.index, I64(7)), b.add(target, b.mul(loop.index, step))
        for half in range(2):
            parts = (split(b, load_vector(b, b.add(row, source), 64 * half)) for row in (x, y))
            for offset, of_x, of_y in zip((0, 2 * TILE), *parts, strict=True):
                store_vector(b, pair(b, of_x, of_y), place, half * TILE + offset)


@compiled
@no_type_check  # tests wrap functions with checks of types, which Numba cannot compile
def copy(target: int, target_stride: int, source: int, source_stride: int, rows: int, columns: int) -> None:
    """Copies rows of four-byte elements."""
    for i in range(rows):
        copy_row(target + i * target_stride, source + i * source_stride, columns)


@compiled
@no_type_check
def pack(
    source: int, stride: int, count: int, inner: int, inner_last: bool, transposed: bool, target: int, edge: int
) -> None:
    """Splits rows [count, inner] (`inner_last`) or columns [inner, count] into panels of 32, filled up with zeros."""
    steps, panels = (inner + 31) // 32, (count + 31) // 32
    done = 0  # panels, in all steps of 32
    if not inner_last and not transposed:
        done = count // 32
        for number in range(inner // 32 * 16):  # along the rows: memory is read as fast as it can be
            step, row = number // 16, number % 16
            start = source + (32 * step + row) * stride
            split_rows(start, start + 16 * stride, target + step * STEP + 64 * row, done, steps * STEP)
    for number in range(steps * panels):  # as the source lies in memory
        panel, step = (number // steps, number % steps) if inner_last else (number % panels, number // panels)
        if panel < done and 32 * step + 32 <= inner:
            continue
        for half in range(2 * panel, min(2 * panel + 2, (count + 15) // 16)):
            across, along = min(16, count - 16 * half), min(32, inner - 32 * step)
            start = source + (16 * half * stride + 128 * step if inner_last else 64 * half + 32 * step * stride)
            start_stride = stride
            if across < 16 or along < 32:
                for i in range(512):
                    clear_element(edge + 4 * i)
                edge_stride, rows, columns = (128, across, along) if inner_last else (64, along, across)
                copy(edge, edge_stride, start, stride, rows, columns)
                start, start_stride = edge, edge_stride
            tile = target + (panel * steps + step) * STEP + half % 2 * TILE
            if inner_last:
                if transposed:
                    split_tile(start, start_stride, tile, 1, 1)
                else:
                    split_tile(start, start_stride, tile, 1, 0)
            elif transposed:
                split_tile(start, start_stride, tile, 0, 1)
            else:
                split_tile(start, start_stride, tile, 0, 0)


@compiled
@no_type_check
def multiply_square(
    a: int, a_step: int, b: int, b_step: int, out: int, right: int, below: int, stride: int, steps: int, fresh: bool
) -> None:
    """Computes up to 32 x 32 of a result, or adds to them; small terms are added first.

    Args:
        a, b: addresses of factors, see `pack`; their steps lie `a_step` and `b_step` bytes apart.
        out: address of the first tile of the result; the others lie `right` and `below` bytes from there.
        stride: bytes from a row of the result to the next.
        steps: of the inner dimension.
        fresh: nothing is there that is added to.
    """
    if fresh:
        clear(0), clear(1), clear(2), clear(3)
    else:
        load(0, out, stride), load(1, out + right, stride)
        load(2, out + below, stride), load(3, out + below + right, stride)
    for _ in range(steps):
        load(4, a + 2 * TILE, 64), load(6, b, 64), dot(0, 4, 6), load(7, b + TILE, 64), dot(1, 4, 7)
        load(5, a + 3 * TILE, 64), dot(2, 5, 6), dot(3, 5, 7)
        load(4, a, 64), dot(0, 4, 6), dot(1, 4, 7), load(5, a + TILE, 64), dot(2, 5, 6), dot(3, 5, 7)
        load(6, b + 2 * TILE, 64), dot(0, 4, 6), dot(2, 5, 6)
        load(7, b + 3 * TILE, 64), dot(1, 4, 7), dot(3, 5, 7)
        a, b = a + a_step, b + b_step
    store(0, out, stride), store(1, out + right, stride)
    store(2, out + below, stride), store(3, out + below + right, stride)
