"""Panels of stored weights for many rows: some rows of a matrix as float32, strips of 16 columns one after the other.

Weights that lie in a panel are read from the second-level cache for every few rows of factors, and sums stay in
registers for as many products as the panel is deep. Meanwhile the next panel's weights are fetched from memory.
"""

from typing import no_type_check

from llvmlite import ir
from numba.core import cgutils

from mixtral_jax.kernels.cpu.intrinsics import I32, I64, Builder, Value, compiled, emits, pointer, read
from mixtral_jax.kernels.cpu.simd import (
    FLOAT,
    FLOATS,
    INTS,
    call,
    load_masked,
    load_vector,
    shuffle,
    splat,
    spread,
    store_masked,
    store_vector,
    variable,
)

WIDE, HALF, EIGHTH = 4, 2, 1  # kinds of weights, by the bytes of one: float32, bfloat16, int8
ORDER = [*range(0, 16, 2), *range(1, 16, 2)]  # of 16 weights of two bytes which are taken apart without shuffles
DEEP = 64  # rows of a panel
STRIP = 64 * DEEP + 64  # bytes from one strip to the next: a power of two would be the same places of a cache


def load_weights(b: Builder, address: Value, kind: int, there: Value | None) -> Value:
    """Reads 16 weights, or those that exist, as float32."""
    if kind == WIDE:
        if there is None:
            return b.load(pointer(b, address, FLOATS), align=4)
        return load_masked(b, address, there, 0.0)
    stored = ir.VectorType(ir.IntType(8 * kind), 16)
    if there is None:
        raw = b.load(pointer(b, address, stored), align=kind)
    else:
        masked = ir.FunctionType(stored, [stored.as_pointer(), there.type, stored])
        read_some = cgutils.get_or_insert_function(b.module, masked, f"llvm.masked.load.v16i{8 * kind}.p0")
        raw = b.call(read_some, [pointer(b, address, stored), there, splat(stored, 0)])
    if kind == HALF:
        return b.bitcast(b.shl(b.zext(raw, INTS), splat(INTS, 16)), FLOATS)
    return b.sitofp(b.sext(raw, INTS), FLOATS)


def load_pairs(b: Builder, address: Value) -> Value:
    """Reads 16 weights of bfloat16 as float32, in the order of `ORDER`."""
    kind = ir.VectorType(I32, 8)
    pairs = b.load(pointer(b, address, kind), align=2)
    halves = b.shl(pairs, splat(kind, 16)), b.and_(pairs, splat(kind, -(1 << 16)))
    return b.bitcast(shuffle(b, *halves, [*range(16)]), FLOATS)


def first_lanes(b: Builder, count: Value) -> Value:
    """Says of 16 lanes which come before a number."""
    return b.icmp_signed("<", ir.Constant(INTS, list(range(16))), spread(b, b.trunc(count, I32), INTS))


def prefetch(b: Builder, address: Value) -> None:
    """Asks for memory that is read soon; an address that is none is no harm."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [pointer(b, address), I32(0), I32(3), I32(1)])


@emits()
def fill_panel(b: Builder, panel: Value, w: Value, outer: Value, depth: Value, columns: Value, kind: int) -> None:
    """Copies some rows of weights to a panel, zeros behind the last column."""
    whole, left = b.lshr(columns, I64(4)), b.and_(columns, I64(15))
    with cgutils.for_range(b, depth) as row:
        source = b.add(w, b.mul(row.index, b.mul(outer, I64(kind))))
        target = b.add(panel, b.shl(row.index, I64(6)))

        def copy(strip: Value, there: Value | None, source: Value = source, target: Value = target) -> None:
            weights = load_weights(b, b.add(source, b.mul(strip, I64(16 * kind))), kind, there)
            store_vector(b, weights, b.add(target, b.mul(strip, I64(STRIP))))

        with cgutils.for_range(b, whole) as strip:
            copy(strip.index, None)
        with b.if_then(b.icmp_signed(">", left, I64(0))):
            copy(whole, first_lanes(b, left))


@emits()
def add_strip(
    b: Builder, out: Value, x: Value, inner: Value, strip: Value, outer: Value, depth: Value, columns: Value,
    ahead: Value, stride: Value, shift: Value, rows: int,
) -> None:  # fmt: skip
    """Adds products of some rows of factors with a strip of a panel to up to 16 columns of the results.

    Meanwhile it fetches memory from `ahead` on: 2^`shift` lines, and as many `stride` bytes behind, and so on.
    """
    places = [b.add(out, b.mul(outer, I64(4 * row))) for row in range(rows)]
    factors = [b.add(x, b.mul(inner, I64(4 * row))) for row in range(rows)]
    totals = [variable(b, splat(FLOATS, 0.0)) for _ in range(rows)]
    whole = b.icmp_signed(">=", columns, I64(16))
    there = first_lanes(b, columns)
    with b.if_else(whole) as (then, otherwise):
        with then:
            for total, place in zip(totals, places, strict=True):
                b.store(load_vector(b, place), total)
        with otherwise:
            for total, place in zip(totals, places, strict=True):
                b.store(load_masked(b, place, there, 0.0), total)
    with cgutils.for_range(b, depth) as k:
        weights = load_vector(b, b.add(strip, b.shl(k.index, I64(6))))
        row, line = b.lshr(k.index, shift), b.and_(k.index, b.sub(b.shl(I64(1), shift), I64(1)))
        prefetch(b, b.add(ahead, b.add(b.mul(row, stride), b.shl(line, I64(6)))))
        for total, row in zip(totals, factors, strict=True):
            factor = spread(b, b.load(pointer(b, b.add(row, b.shl(k.index, I64(2))), FLOAT)), FLOATS)
            b.store(call(b, "fma", weights, factor, b.load(total)), total)
    with b.if_else(whole) as (then, otherwise):
        with then:
            for total, place in zip(totals, places, strict=True):
                store_vector(b, b.load(total), place)
        with otherwise:
            for total, place in zip(totals, places, strict=True):
                store_masked(b, b.load(total), place, there)


@compiled
@no_type_check
def multiply_panel(panel: int, place: int, left: int, columns: int, k: int, own: int, kind: int) -> None:
    """Adds products of all rows with a panel.

    Args:
        panel: its address.
        place: entry of the table of products, see `stored_matmul`.
        left: first column.
        columns: of the panel.
        k: the panel's first row.
        own: address of the weights that it was filled with.
        kind: of these.
    """
    x, out = read(place + 16), read(place + 24) + 4 * left
    rows, outer, inner = read(place + 32), read(place + 40), read(place + 48)
    depth, strips, shift = min(DEEP, inner - k), -(-columns // 16), 0
    while 128 << shift <= columns * kind:
        shift += 1
    for number in range(strips):
        strip, there, row = panel + STRIP * number, columns - 16 * number, 0
        ahead, stride = strip, 0  # nothing new
        if inner - k > DEEP:  # of the next panel; what is no memory at all takes long to ask for
            ahead, stride = own + kind * outer * (DEEP + DEEP * number // strips), kind * outer
        while row < rows:
            to, of_x, rest = out + 64 * number + 4 * row * outer, x + 4 * (row * inner + k), rows - row
            if rest >= 6:  # 12 of 16 registers of AVX hold sums
                add_strip(to, of_x, inner, strip, outer, depth, there, ahead, stride, shift, 6)
                row += 6
            elif rest >= 4:
                add_strip(to, of_x, inner, strip, outer, depth, there, ahead, stride, shift, 4)
                row += 4
            elif rest >= 2:
                add_strip(to, of_x, inner, strip, outer, depth, there, ahead, stride, shift, 2)
                row += 2
            else:
                add_strip(to, of_x, inner, strip, outer, depth, there, ahead, stride, shift, 1)
                row += 1
            ahead, stride = strip, 0
