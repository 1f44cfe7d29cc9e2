"""Float32 products on the bfloat16 matrix units (AMX) of x86 processors, compiled by Numba.

A float32 number is nearly the sum of two bfloat16 numbers, `high` and `low`, so a product of two is nearly
high high + high low + low high, each exact in the unit and summed in float32. The error is about 4e-6 of the factors'
norms: ten times float32's own, a hundredth of TF32's. Source: arXiv 1904.06376.

A tile is 16 rows of 64 bytes. Factors are cut into tiles of 16 rows or columns by 32 of the inner dimension, in the
order in which the unit reads them: pairs along the inner dimension lie together.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

DEPTH, WIDTH = 256, 512  # inner dimension and columns of the second factor's part that stays in the L2 cache
TILE, STEP = 1024, 4096  # bytes of a tile, and of the high and low tiles of 32 rows or columns
PACKED = 128  # rows of the first factor that are split at once
FIRST, SECOND, EDGE = 0, PACKED * DEPTH * 4, (PACKED + WIDTH) * DEPTH * 4  # places in a thread's workspace
WORKSPACE = EDGE + STEP  # bytes

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
INTS, FLOATS, SHORTS = (ir.VectorType(t, n) for t, n in ((I32, 16), (ir.FloatType(), 16), (ir.IntType(16), 32)))
Builder = Any
Code = tuple[Any, Callable[..., Any]]  # a signature, and what writes LLVM's instructions


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


def _emit(builder: Builder, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _pointer(builder: Builder, address: Any, kind: Any = I8) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _returns_nothing(write: Callable[..., None], *arguments: Any) -> Code:
    def generate(context: Any, builder: Builder, _: Any, values: Any) -> Any:
        write(builder, *values)
        return context.get_dummy_value()

    return types.void(*arguments), generate


@intrinsic
def _configure(_: Any, address: Any) -> Code:
    return _returns_nothing(lambda b, a: _emit(b, "ldtilecfg", _pointer(b, a)), types.int64)


@intrinsic
def _release(_: Any) -> Code:
    return _returns_nothing(lambda b: _emit(b, "tilerelease"))


@intrinsic(prefer_literal=True)
def _clear(_: Any, tile: Any) -> Code:
    return _returns_nothing(lambda b, _: _emit(b, "tilezero", I8(tile.literal_value)), tile)


@intrinsic(prefer_literal=True)
def _load(_: Any, tile: Any, address: Any, stride: Any) -> Code:
    def write(b: Builder, _: Any, a: Any, s: Any) -> None:
        _emit(b, "tileloadd64", I8(tile.literal_value), _pointer(b, a), s)

    return _returns_nothing(write, tile, types.int64, types.int64)


@intrinsic(prefer_literal=True)
def _store(_: Any, tile: Any, address: Any, stride: Any) -> Code:
    def write(b: Builder, _: Any, a: Any, s: Any) -> None:
        _emit(b, "tilestored64", I8(tile.literal_value), _pointer(b, a), s)

    return _returns_nothing(write, tile, types.int64, types.int64)


@intrinsic(prefer_literal=True)
def _dot(_: Any, total: Any, a: Any, b: Any) -> Code:
    numbers = [I8(tile.literal_value) for tile in (total, a, b)]
    return _returns_nothing(lambda builder, *_: _emit(builder, "tdpbf16ps", *numbers), total, a, b)


@intrinsic
def _next(_: Any, counter: Any) -> Code:
    """Reads a counter that threads share, and raises it by one."""

    def generate(_: Any, builder: Builder, __: Any, values: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, values[0], I64), I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _copy_element(_: Any, target: Any, source: Any) -> Code:
    def write(b: Builder, target: Any, source: Any) -> None:
        b.store(b.load(_pointer(b, source, I32)), _pointer(b, target, I32))

    return _returns_nothing(write, types.int64, types.int64)


@intrinsic
def _clear_element(_: Any, target: Any) -> Code:
    return _returns_nothing(lambda b, target: b.store(I32(0), _pointer(b, target, I32)), types.int64)


def _all(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _shuffle(b: Builder, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _round(b: Builder, x: Any) -> Any:
    """Rounds floats to bfloat16, half away from zero, in the upper halves of integers."""
    return b.and_(b.add(b.bitcast(x, INTS), _all(INTS, 0x8000)), _all(INTS, 0xFFFF0000))


def _split(b: Builder, address: Any) -> tuple[Any, Any]:
    """Reads 16 floats as their high and their low parts."""
    x = b.load(_pointer(b, address, FLOATS), align=4)
    high = _round(b, x)
    return high, _round(b, b.fsub(x, b.bitcast(high, FLOATS)))


def _transpose(b: Builder, rows: list[Any]) -> list[Any]:
    """Exchanges rows and columns of 16 x 16 integers: of ever smaller squares, those off the diagonal change places."""
    rows = list(rows)
    for size in (8, 4, 2, 1):
        for i in (i for i in range(16) if not i & size):
            x, y = rows[i], rows[i + size]
            rows[i] = _shuffle(b, x, y, [16 + j - size if j & size else j for j in range(16)])
            rows[i + size] = _shuffle(b, x, y, [16 + j if j & size else j + size for j in range(16)])
    return rows


@intrinsic(prefer_literal=True)
def _split_tile(_: Any, source: Any, stride: Any, target: Any, inner_last: Any, transposed: Any) -> Code:
    """Turns floats, [16, 32] with the inner dimension last or [32, 16], into a high tile and, two on, a low one."""
    last, turn = bool(inner_last.literal_value), bool(transposed.literal_value)
    odd = list(range(1, 64, 2))

    def write(b: Builder, source: Any, stride: Any, target: Any, *_: Any) -> None:
        parts: tuple[list[Any], list[Any]] = ([], [])
        for row in range(16):
            address = b.add(source, b.mul(stride, I64(row if last else 2 * row)))
            behind = b.add(address, I64(64)) if last else b.add(address, stride)
            for part, x, y in zip(parts, _split(b, address), _split(b, behind), strict=True):
                if last:  # the upper halves of both, one behind the other
                    pairs = b.bitcast(_shuffle(b, b.bitcast(x, SHORTS), b.bitcast(y, SHORTS), odd), INTS)
                else:
                    pairs = b.or_(y, b.lshr(x, _all(INTS, 16)))
                part.append(pairs)
        for part, offset in zip(parts, (0, 2 * TILE), strict=True):
            for row, pairs in enumerate(_transpose(b, part) if turn else part):
                b.store(pairs, _pointer(b, b.add(target, I64(offset + 64 * row)), INTS), align=64)

    return _returns_nothing(write, types.int64, types.int64, types.int64, inner_last, transposed)


@njit(nogil=True, cache=True)
@no_type_check  # tests wrap functions with checks of types, which Numba cannot compile
def _copy(target: int, target_stride: int, source: int, source_stride: int, rows: int, columns: int) -> None:
    for i in range(rows):
        for j in range(columns):
            _copy_element(target + i * target_stride + 4 * j, source + i * source_stride + 4 * j)


@njit(nogil=True, cache=True)
@no_type_check
def _pack(
    source: int, stride: int, count: int, inner: int, inner_last: bool, transposed: bool, target: int, edge: int
) -> None:
    """Splits rows [count, inner] (`inner_last`) or columns [inner, count] into panels of 32, filled up with zeros."""
    steps, panels = (inner + 31) // 32, (count + 31) // 32
    for number in range(steps * panels):  # as the source lies in memory
        panel, step = (number // steps, number % steps) if inner_last else (number % panels, number // panels)
        for half in range(2 * panel, min(2 * panel + 2, (count + 15) // 16)):
            across, along = min(16, count - 16 * half), min(32, inner - 32 * step)
            start = source + (16 * half * stride + 128 * step if inner_last else 64 * half + 32 * step * stride)
            start_stride = stride
            if across < 16 or along < 32:
                for i in range(512):
                    _clear_element(edge + 4 * i)
                edge_stride, rows, columns = (128, across, along) if inner_last else (64, along, across)
                _copy(edge, edge_stride, start, stride, rows, columns)
                start, start_stride = edge, edge_stride
            tile = target + (panel * steps + step) * STEP + half % 2 * TILE
            if inner_last:
                if transposed:
                    _split_tile(start, start_stride, tile, 1, 1)
                else:
                    _split_tile(start, start_stride, tile, 1, 0)
            elif transposed:
                _split_tile(start, start_stride, tile, 0, 1)
            else:
                _split_tile(start, start_stride, tile, 0, 0)


@njit(nogil=True, cache=True)
@no_type_check
def _multiply_32(a: int, b: int, out: int, stride: int, steps: int, fresh: bool) -> None:
    """Computes 17 to 32 rows by 32 columns of a result; small terms are added first."""
    below = out + 16 * stride
    if fresh:
        _clear(0), _clear(1), _clear(2), _clear(3)
    else:
        _load(0, out, stride), _load(1, out + 64, stride), _load(2, below, stride), _load(3, below + 64, stride)
    for _ in range(steps):
        _load(4, a + 2 * TILE, 64), _load(6, b, 64), _dot(0, 4, 6), _load(7, b + TILE, 64), _dot(1, 4, 7)
        _load(5, a + 3 * TILE, 64), _dot(2, 5, 6), _dot(3, 5, 7)
        _load(4, a, 64), _dot(0, 4, 6), _dot(1, 4, 7), _load(5, a + TILE, 64), _dot(2, 5, 6), _dot(3, 5, 7)
        _load(6, b + 2 * TILE, 64), _dot(0, 4, 6), _dot(2, 5, 6)
        _load(7, b + 3 * TILE, 64), _dot(1, 4, 7), _dot(3, 5, 7)
        a, b = a + STEP, b + STEP
    _store(0, out, stride), _store(1, out + 64, stride), _store(2, below, stride), _store(3, below + 64, stride)


@njit(nogil=True, cache=True)
@no_type_check
def _multiply_16(a: int, b: int, out: int, stride: int, steps: int, fresh: bool) -> None:
    """Computes up to 16 rows by 32 columns of a result."""
    if fresh:
        _clear(0), _clear(1)
    else:
        _load(0, out, stride), _load(1, out + 64, stride)
    for _ in range(steps):
        _load(4, a + 2 * TILE, 64), _load(6, b, 64), _dot(0, 4, 6), _load(7, b + TILE, 64), _dot(1, 4, 7)
        _load(4, a, 64), _dot(0, 4, 6), _dot(1, 4, 7)
        _load(6, b + 2 * TILE, 64), _dot(0, 4, 6), _load(7, b + 3 * TILE, 64), _dot(1, 4, 7)
        a, b = a + STEP, b + STEP
    _store(0, out, stride), _store(1, out + 64, stride)


@njit(nogil=True, cache=True)
@no_type_check
def multiply_blocks(
    table: np.ndarray,
    turn_a: bool,
    turn_b: bool,
    add: bool,
    height: int,
    counter: int,
    configurations: int,
    workspace: int,
) -> None:
    """Computes blocks of the results of a table of products, as long as the threads that share a counter find one left.

    Args:
        table: see `host_products`.
        turn_a: first factors are transposed.
        turn_b: second factors are.
        add: results are added to what is there.
        height: rows of a block, a multiple of 32.
        counter: address of an int64 that begins at zero.
        configurations: address of those of the unit.
        workspace: address of WORKSPACE bytes of this thread's own, a multiple of 64.
    """
    first, second, edge = workspace + FIRST, workspace + SECOND, workspace + EDGE
    _configure(configurations + 32 * 64)
    product, passed = 0, 0
    while True:
        block = _next(counter)
        while product < len(table):
            across = (table[product, 7] + WIDTH - 1) // WIDTH
            blocks = (table[product, 6] + height - 1) // height * across
            if block < passed + blocks:
                break
            product, passed = product + 1, passed + blocks
        if product == len(table):
            break
        a, b, out, of_a, of_b, of_out, rows, columns, inner = table[product]
        of_a, of_b, of_out = 4 * of_a, 4 * of_b, 4 * of_out
        width = ((columns + across - 1) // across + 31) // 32 * 32
        top, left = (block - passed) // across * height, (block - passed) % across * width
        bottom, right = min(rows, top + height), min(columns, left + width)
        parts = (inner + DEPTH - 1) // DEPTH
        depth = ((inner + parts - 1) // parts + 31) // 32 * 32
        for k in range(0, inner, depth):
            along = min(depth, inner - k)
            steps = (along + 31) // 32
            fresh = k == 0 and not add
            start = b + (left * of_b + 4 * k if turn_b else k * of_b + 4 * left)
            _pack(start, of_b, right - left, along, turn_b, turn_b, second, edge)
            for i in range(top, bottom, 32):
                if (i - top) % PACKED == 0:
                    start = a + (k * of_a + 4 * i if turn_a else i * of_a + 4 * k)
                    _pack(start, of_a, min(PACKED, bottom - i), along, not turn_a, turn_a, first, edge)
                rows_of_a = first + (i - top) % PACKED // 32 * steps * STEP
                height_here = min(32, bottom - i)
                if height_here < 32:
                    _configure(configurations + height_here * 64)
                for j in range(left, right, 32):
                    place, stride = out + i * of_out + 4 * j, of_out
                    partial = right - j < 32
                    if partial:  # the tiles are wider than what is left of the result
                        place, stride = edge, 128
                        _copy(edge, 128, out + i * of_out + 4 * j, of_out, height_here, right - j)
                    tiles = second + (j - left) // 32 * steps * STEP
                    if height_here > 16:
                        _multiply_32(rows_of_a, tiles, place, stride, steps, fresh)
                    else:
                        _multiply_16(rows_of_a, tiles, place, stride, steps, fresh)
                    if partial:
                        _copy(out + i * of_out + 4 * j, of_out, edge, 128, height_here, right - j)
                if height_here < 32:
                    _configure(configurations + 32 * 64)
    _release()
