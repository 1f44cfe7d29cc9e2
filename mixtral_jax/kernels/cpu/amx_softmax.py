"""Vector code of attention on matrix units, for Numba: exponentials, maxima and masks of scores in the units' tiles.

A block is 32 x 32 numbers in four tiles, or factors of 32 x 32: the high tiles of its first and second 16 rows or
columns and then the low ones. Scores are blocks of 32 keys (rows) by 32 queries (columns), so that whatever belongs to
queries, 32 numbers of them, is added, multiplied and compared without moving anything across a vector.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir
from numba.core import cgutils

from mixtral_jax.kernels.cpu.amx_tiles import (
    STEP,
    TILE,
    pair,
    split,
    transpose,
)
from mixtral_jax.kernels.cpu.intrinsics import I32, I64, NUMBER, Builder, Value, emits
from mixtral_jax.kernels.cpu.simd import (
    FLOATS,
    INTS,
    call,
    exp2,
    larger,
    load_vector,
    splat,
    spread,
    store_vector,
    variable,
)

HIDDEN, LEAST = -1e30, -1e20  # a masked score, and what is below every other
ALL = 32 * 4  # bytes of lanes


@contextmanager
def rows_of(b: Builder, address: Value) -> Iterator[Value]:
    """Repeats the code within for 16 rows of tiles; gives the address of a row."""
    with cgutils.for_range(b, I64(16)) as loop:
        yield b.add(address, b.mul(loop.index, I64(64)))


@emits()
def hide(b: Builder, scores: Value, ahead: Value, spans: Value) -> None:
    """Masks a block of scores: a query sees its own position and the `span` - 1 before it.

    `ahead` is the first query's position less the first key's; spans are 32 integers.
    """
    first = spread(b, b.trunc(ahead, I32), INTS)
    for key_half in range(2):
        for query_half in range(2):
            tile = b.add(scores, I64((2 * key_half + query_half) * TILE))
            lanes = ir.Constant(INTS, [16 * (query_half - key_half) + i for i in range(16)])
            span = load_vector(b, spans, 64 * query_half, INTS)
            distance = variable(b, b.add(first, lanes))
            with rows_of(b, tile) as row:
                back = b.load(distance)
                seen = b.icmp_unsigned("<", back, span)
                store_vector(b, b.select(seen, load_vector(b, row), splat(FLOATS, HIDDEN)), row)
                b.store(b.sub(back, splat(INTS, 1)), distance)


@emits()
def begin_peak(b: Builder, peak: Value, total: Value) -> None:
    """Sets what 32 queries know before they see any key."""
    for half in (0, 64):
        store_vector(b, splat(FLOATS, LEAST), peak, half)
        store_vector(b, splat(FLOATS, 0.0), total, half)


@emits(NUMBER)
def raise_peak(
    b: Builder, scores: Value, blocks: Value, scale: Value, peak: Value, total: Value, factor: Value
) -> Value:
    """Finds each query's largest score of some blocks and before, times scale, and shrinks the total of before.

    Returns whether any factor, by which everything of before shrinks, is not 1.
    """
    largest = [variable(b, splat(FLOATS, HIDDEN)) for _ in range(2)]
    with cgutils.for_range(b, blocks) as loop, rows_of(b, b.add(scores, b.mul(loop.index, I64(STEP)))) as row:
        for half, place in enumerate(largest):
            both = larger(b, load_vector(b, row, half * TILE), load_vector(b, row, (2 + half) * TILE))
            b.store(larger(b, b.load(place), both), place)
    changed = []
    for half, place in zip((0, 64), largest, strict=True):
        before = load_vector(b, peak, half)
        now = larger(b, before, b.fmul(b.load(place), load_vector(b, scale, half)))
        shrink = exp2(b, b.fsub(before, now))
        store_vector(b, now, peak, half)
        store_vector(b, shrink, factor, half)
        store_vector(b, b.fmul(load_vector(b, total, half), shrink), total, half)
        changed.append(b.fcmp_unordered("!=", shrink, splat(FLOATS, 1.0)))
    return b.zext(b.bitcast(b.or_(*changed), ir.IntType(16)), I64)


@emits()
def shrink_block(b: Builder, block: Value, factor: Value) -> None:
    """Multiplies a block, which has queries in its lanes, by a factor of each query."""
    factors = [load_vector(b, factor, half) for half in (0, 64)]
    with rows_of(b, block) as row:
        for tile in range(4):
            product = b.fmul(load_vector(b, row, tile * TILE), factors[tile % 2])
            store_vector(b, product, row, tile * TILE)


@emits()
def exponentiate(b: Builder, scores: Value, scale: Value, peak: Value, total: Value) -> None:
    """Turns a block of scores into probabilities times the total, as a second factor; adds them to the total."""
    scales = [load_vector(b, scale, half) for half in (0, 64)]
    peaks = [b.fneg(load_vector(b, peak, half)) for half in (0, 64)]
    totals = [variable(b, load_vector(b, total, half)) for half in (0, 64)]
    with rows_of(b, scores) as row:
        for half in range(2):
            parts = []
            for tile in (half, 2 + half):
                x = load_vector(b, row, tile * TILE)
                p = exp2(b, call(b, "fma", x, scales[half], peaks[half]))
                b.store(b.fadd(b.load(totals[half]), p), totals[half])
                parts.append(split(b, p))
            for place, x, y in zip((half, 2 + half), *parts, strict=True):
                store_vector(b, pair(b, x, y), row, place * TILE)
    for half, place in zip((0, 64), totals, strict=True):
        store_vector(b, b.load(place), total, half)


@emits()
def finish_total(b: Builder, peak: Value, total: Value, log_total: Value) -> None:
    """Replaces a total by its inverse; gives the binary logarithm of the sum of all exponentials."""
    for half in (0, 64):
        x = load_vector(b, total, half)
        store_vector(b, b.fadd(load_vector(b, peak, half), call(b, "log2", x)), log_total, half)
        store_vector(b, b.fdiv(splat(FLOATS, 1.0), x), total, half)


@emits()
def differentiate(
    b: Builder, scores: Value, d_scores: Value, turned: Value, scale: Value, log_total: Value, delta: Value
) -> None:
    """Turns a block of scores into probabilities and one of gradients of these into those of scores, less the scale.

    Both become first factors in place, whose inner dimension is that of queries; the gradients of scores become a
    second factor too, in `turned`, whose inner dimension is that of keys.
    """
    scales, deltas = ([load_vector(b, lanes, half) for half in (0, 64)] for lanes in (scale, delta))
    logs = [b.fneg(load_vector(b, log_total, half)) for half in (0, 64)]
    with cgutils.for_range(b, I64(16)) as loop:
        offset = b.mul(loop.index, I64(64))
        row, d_row, turned_row = (b.add(address, offset) for address in (scores, d_scores, turned))
        ps, ds = [], []
        for tile in range(4):
            half = tile % 2
            x = load_vector(b, row, tile * TILE)
            p = exp2(b, call(b, "fma", x, scales[half], logs[half]))
            d = b.fmul(p, b.fsub(load_vector(b, d_row, tile * TILE), deltas[half]))
            ps.append(split(b, p))
            ds.append(split(b, d))
        for part in range(2):
            for keys in range(2):
                place = (2 * part + keys) * TILE
                for parts, target in ((ps, row), (ds, d_row)):
                    store_vector(b, pair(b, parts[2 * keys][part], parts[2 * keys + 1][part]), target, place)
            for queries in range(2):
                both = pair(b, ds[queries][part], ds[2 + queries][part])
                store_vector(b, both, turned_row, (2 * part + queries) * TILE)


@emits()
def write_tile(b: Builder, tile: Value, factor: Value, target: Value, stride: Value, turned: bool) -> None:
    """Writes a tile's floats times factors of its columns, rows and columns exchanged if it is `turned`."""
    factors = load_vector(b, factor)
    rows = [b.fmul(load_vector(b, tile, 64 * i), factors) for i in range(16)]
    for i, row in enumerate(transpose(b, rows) if turned else rows):
        store_vector(b, row, b.add(target, b.mul(stride, I64(i))))


@emits()
def clear_memory(b: Builder, address: Value, size: Value) -> None:
    """Writes zeros; `size` is a multiple of 64."""
    with cgutils.for_range(b, b.lshr(size, I64(6))) as loop:
        store_vector(b, splat(INTS, 0), b.add(address, b.mul(loop.index, I64(64))))
