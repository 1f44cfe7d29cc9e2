"""Vectors of 16 numbers for functions that Numba compiles: LLVM makes of them what the processor has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from mixtral_jax.kernels.cpu.intrinsics import I32, I64, REAL, Builder, Value, emits, pointer

FLOAT = ir.FloatType()
INTS, FLOATS = ir.VectorType(I32, 16), ir.VectorType(FLOAT, 16)
LEAST = -1e30  # less than every number that matters
NOTHING = -100.0  # 2 to the power of less counts as zero: parts of it stay far from subnormal numbers
# 2^x from -0.5 to 0.5 to 1e-7
POLYNOMIAL = np.polynomial.Chebyshev.interpolate(np.exp2, 5, [-0.5, 0.5]).convert(kind=np.polynomial.Polynomial).coef
LARGEST_POWER = 126.0  # 2 to its power is still a number
ROUNDING = 1.5 * 2.0**23  # added to a float of moderate size, it leaves an integer in the last bits


def splat(kind: ir.VectorType, value: int | float) -> Value:
    """Makes a vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


def shuffle(b: Builder, x: Value, y: Value, lanes: list[int]) -> Value:
    """Takes lanes of two vectors, those of the second counted on."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def load_vector(b: Builder, address: Value, offset: int = 0, kind: ir.Type = FLOATS) -> Value:
    """Reads 64 bytes."""
    return b.load(pointer(b, b.add(address, I64(offset)), kind), align=4)


def store_vector(b: Builder, value: Value, address: Value, offset: int = 0) -> None:
    """Writes 64 bytes."""
    b.store(value, pointer(b, b.add(address, I64(offset)), value.type), align=4)


def call(b: Builder, name: str, *vectors: Value) -> Value:
    """Calls a function of LLVM's on floats."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * len(vectors))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v16f32"), vectors)


def exp2(b: Builder, x: Value) -> Value:
    """Computes 2^x for x up to some tens; NaN stays NaN."""
    shifted = b.fadd(x, splat(FLOATS, ROUNDING))
    fraction = b.fsub(x, b.fsub(shifted, splat(FLOATS, ROUNDING)))
    value = splat(FLOATS, POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        value = call(b, "fma", value, fraction, splat(FLOATS, coefficient))
    exponent = b.shl(b.bitcast(shifted, INTS), splat(INTS, 23))
    power = b.bitcast(b.add(b.bitcast(value, INTS), exponent), FLOATS)
    return b.select(b.fcmp_unordered(">=", x, splat(FLOATS, NOTHING)), power, splat(FLOATS, 0.0))


def larger(b: Builder, x: Value, y: Value) -> Value:
    """Computes the maximum; that with NaN is y."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def variable(b: Builder, value: Value) -> Value:
    """Makes a place for a value that changes in a loop; LLVM keeps it in a register."""
    place = cgutils.alloca_once(b, value.type)
    b.store(value, place)
    return place


def spread(b: Builder, value: Value, kind: ir.VectorType) -> Value:
    """Makes a vector of a value that is not known yet."""
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return b.shuffle_vector(first, first, splat(INTS, 0))


def reduce_lanes(b: Builder, values: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Combines all numbers of a vector to one."""
    for size in (8, 4, 2, 1):
        order = ir.Constant(INTS, [i ^ size for i in range(16)])
        values = combine(values, b.shuffle_vector(values, values, order))
    return b.extract_element(values, I32(0))


@contextmanager
def chunks_of(b: Builder, count: Value) -> Iterator[tuple[Value, Value]]:
    """Repeats the code within for 16 numbers of a row after the other; gives their offset in bytes and which exist."""
    with cgutils.for_range(b, b.lshr(b.add(count, I64(15)), I64(4))) as loop:
        left = b.trunc(b.sub(count, b.mul(loop.index, I64(16))), I32)
        there = b.icmp_signed("<", ir.Constant(INTS, list(range(16))), spread(b, left, INTS))
        yield b.mul(loop.index, I64(64)), there


def load_masked(b: Builder, address: Value, there: Value, otherwise: float) -> Value:
    """Reads those of 16 numbers that exist."""
    kind = ir.FunctionType(FLOATS, [FLOATS.as_pointer(), there.type, FLOATS])
    read = cgutils.get_or_insert_function(b.module, kind, "llvm.masked.load.v16f32.p0")
    return b.call(read, [pointer(b, address, FLOATS), there, splat(FLOATS, otherwise)])


def store_masked(b: Builder, value: Value, address: Value, there: Value) -> None:
    """Writes those of 16 numbers that exist."""
    kind = ir.FunctionType(ir.VoidType(), [FLOATS, FLOATS.as_pointer(), I32, there.type])
    write = cgutils.get_or_insert_function(b.module, kind, "llvm.masked.store.v16f32.p0")
    b.call(write, [value, pointer(b, address, FLOATS), I32(4), there])


@emits()
def dot_row(b: Builder, target: Value, x: Value, y: Value, count: Value) -> None:
    """Computes the product of two rows of numbers."""
    totals = [variable(b, splat(FLOATS, 0.0)) for _ in range(4)]  # one would wait for itself
    whole = b.lshr(count, I64(6))
    with cgutils.for_range(b, whole) as loop:
        for i, total in enumerate(totals):
            offset = b.add(b.shl(loop.index, I64(8)), I64(64 * i))
            numbers = [load_vector(b, b.add(row, offset)) for row in (x, y)]
            b.store(call(b, "fma", *numbers, b.load(total)), total)
    done = b.shl(whole, I64(8))
    with chunks_of(b, b.and_(count, I64(63))) as (offset, there):
        place = b.add(done, offset)
        numbers = [load_masked(b, b.add(row, place), there, 0.0) for row in (x, y)]
        b.store(call(b, "fma", *numbers, b.load(totals[0])), totals[0])
    first, second, third, fourth = (b.load(total) for total in totals)
    total = b.fadd(b.fadd(first, second), b.fadd(third, fourth))
    b.store(reduce_lanes(b, total, b.fadd), pointer(b, target, FLOAT))


@emits()
def copy_row(b: Builder, target: Value, source: Value, count: Value) -> None:
    """Copies numbers of four bytes."""
    with chunks_of(b, count) as (offset, there):
        store_masked(b, load_masked(b, b.add(source, offset), there, 0.0), b.add(target, offset), there)


@emits()
def stream_square(b: Builder, target: Value, stride: Value, source: Value, rows: Value) -> None:
    """Copies rows of 32 numbers past the caches: lines of memory that are written whole need not be read first."""
    past = b.module.add_metadata([I32(1)])
    with cgutils.for_range(b, rows) as loop:
        place, origin = b.add(target, b.mul(loop.index, stride)), b.add(source, b.shl(loop.index, I64(7)))
        for half in (0, 64):
            value = load_vector(b, origin, half)
            b.store(value, pointer(b, b.add(place, I64(half)), FLOATS), align=64).set_metadata("nontemporal", past)


@emits(REAL)
def find_peak(b: Builder, row: Value, count: Value) -> Value:
    """Finds the largest of a row of numbers."""
    peak = variable(b, splat(FLOATS, LEAST))
    with chunks_of(b, count) as (offset, there):
        b.store(larger(b, b.load(peak), load_masked(b, b.add(row, offset), there, LEAST)), peak)
    return reduce_lanes(b, b.load(peak), lambda x, y: larger(b, x, y))


@emits(REAL, peak=REAL)
def sum_exponentials(b: Builder, row: Value, count: Value, peak: Value, kept: bool) -> Value:
    """Sums exponentials of a row of numbers less their peak; writes them over the row if they are to be kept."""
    peaks, total = spread(b, peak, FLOATS), variable(b, splat(FLOATS, 0.0))
    with chunks_of(b, count) as (offset, there):
        place = b.add(row, offset)
        below = b.fsub(load_masked(b, place, there, LEAST), peaks)
        power = exp2(b, b.fmul(below, splat(FLOATS, np.log2(np.e))))
        b.store(b.fadd(b.load(total), power), total)
        if kept:
            store_masked(b, power, place, there)
    return reduce_lanes(b, b.load(total), b.fadd)


@emits(factor=REAL)
def scale_row(b: Builder, row: Value, count: Value, factor: Value) -> None:
    """Multiplies a row of numbers by a factor."""
    factors = spread(b, factor, FLOATS)
    with chunks_of(b, count) as (offset, there):
        place = b.add(row, offset)
        store_masked(b, b.fmul(load_masked(b, place, there, 0.0), factors), place, there)


def _sigmoid(b: Builder, x: Value) -> Value:
    """Computes 1 / (1 + e^-x); NaN stays NaN."""
    power, limit = b.fmul(x, splat(FLOATS, -np.log2(np.e))), splat(FLOATS, LARGEST_POWER)
    power = b.select(b.fcmp_unordered("<", power, limit), power, limit)
    return b.fdiv(splat(FLOATS, 1.0), b.fadd(splat(FLOATS, 1.0), exp2(b, power)))


@emits()
def swiglu_row(b: Builder, gate: Value, up: Value, out: Value, count: Value) -> None:
    """Writes silu(gate) * up."""
    with chunks_of(b, count) as (offset, there):
        x, y = (load_masked(b, b.add(row, offset), there, 0.0) for row in (gate, up))
        silu = b.fmul(x, _sigmoid(b, x))
        store_masked(b, b.fmul(silu, y), b.add(out, offset), there)


@emits()
def differentiate_swiglu_row(b: Builder, gate: Value, up: Value, d_out: Value, count: Value) -> None:
    """Replaces gate and up by their gradients and the result's gradient by the result."""
    with chunks_of(b, count) as (offset, there):
        places = [b.add(row, offset) for row in (gate, up, d_out)]
        x, y, d = (load_masked(b, place, there, 0.0) for place in places)
        sigmoid = _sigmoid(b, x)
        silu = b.fmul(x, sigmoid)
        slope = call(b, "fma", silu, b.fsub(splat(FLOATS, 1.0), sigmoid), sigmoid)
        results = (b.fmul(b.fmul(d, y), slope), b.fmul(d, silu), b.fmul(silu, y))
        for place, value in zip(places, results, strict=True):
            store_masked(b, value, place, there)
