"""Float32 products on the bfloat16 matrix units of x86 processors: see `amx_tiles` for the arithmetic."""

from typing import no_type_check

import numpy as np

from mixtral_jax.kernels.cpu.amx_tiles import (
    STEP,
    TILE,
    clear,
    configure,
    copy,
    dot,
    load,
    multiply_square,
    pack,
    release,
    store,
)
from mixtral_jax.kernels.cpu.intrinsics import (
    CONFIGURATIONS,
    MULTIPLY,
    compiled,
    read_state,
    view,
)
from mixtral_jax.kernels.cpu.matmul import ENTRIES, HEIGHT, TABLE, WIDTH, by_blocks
from mixtral_jax.kernels.cpu.simd import stream_square
from mixtral_jax.kernels.cpu.thread_pool import COUNTER, argument, begin, end, take_next

DEPTH = 256  # inner dimension of the second factor's part, of WIDTH columns, that stays in the L2 cache
PACKED = 128  # rows of the first factor that are split at once
FIRST, SECOND, EDGE = 0, PACKED * DEPTH * 4, (PACKED + WIDTH) * DEPTH * 4  # places in a thread's workspace


@compiled
@no_type_check
def _multiply_16(a: int, b: int, out: int, stride: int, steps: int, fresh: bool) -> None:
    """Computes up to 16 rows by 32 columns of a result."""
    if fresh:
        clear(0), clear(1)
    else:
        load(0, out, stride), load(1, out + 64, stride)
    for _ in range(steps):
        load(4, a + 2 * TILE, 64), load(6, b, 64), dot(0, 4, 6), load(7, b + TILE, 64), dot(1, 4, 7)
        load(4, a, 64), dot(0, 4, 6), dot(1, 4, 7)
        load(6, b + 2 * TILE, 64), dot(0, 4, 6), load(7, b + 3 * TILE, 64), dot(1, 4, 7)
        a, b = a + STEP, b + STEP
    store(0, out, stride), store(1, out + 64, stride)


@compiled
@no_type_check
def multiply_blocks(
    table: np.ndarray,
    turn_a: bool,
    turn_b: bool,
    add: bool,
    stream: bool,
    height: int,
    counter: int,
    workspace: int,
) -> None:
    """Computes blocks of the results of a table of products, as long as the threads that share a counter find one left.

    Args:
        table: see `matmul`.
        turn_a: first factors are transposed.
        turn_b: second factors are.
        add: results are added to what is there.
        stream: results are not read soon.
        height: rows of a block, a multiple of 32.
        counter: address of an int64 that begins at zero.
        workspace: address of memory of this thread's own, a multiple of 64.
    """
    first, second, edge = workspace + FIRST, workspace + SECOND, workspace + EDGE
    configurations = read_state(CONFIGURATIONS)
    configure(configurations + 32 * 64)
    product, passed = 0, 0
    while True:
        block = take_next(counter)
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
            streams = stream and fresh and along == inner and (out | of_out) % 64 == 0
            start = b + (left * of_b + 4 * k if turn_b else k * of_b + 4 * left)
            pack(start, of_b, right - left, along, turn_b, turn_b, second, edge)
            for i in range(top, bottom, 32):
                if (i - top) % PACKED == 0:
                    start = a + (k * of_a + 4 * i if turn_a else i * of_a + 4 * k)
                    pack(start, of_a, min(PACKED, bottom - i), along, not turn_a, turn_a, first, edge)
                rows_of_a = first + (i - top) % PACKED // 32 * steps * STEP
                height_here = min(32, bottom - i)
                if height_here < 32:
                    configure(configurations + height_here * 64)
                for j in range(left, right, 32):
                    place, stride = out + i * of_out + 4 * j, of_out
                    partial = right - j < 32
                    if streams and not partial and height_here == 32:
                        tiles = second + (j - left) // 32 * steps * STEP
                        multiply_square(rows_of_a, STEP, tiles, STEP, edge, 64, 16 * 128, 128, steps, True)
                        stream_square(place, stride, edge, 32)
                        continue
                    if partial:  # the tiles are wider than what is left of the result
                        place, stride = edge, 128
                        if not fresh:
                            copy(edge, 128, out + i * of_out + 4 * j, of_out, height_here, right - j)
                    tiles = second + (j - left) // 32 * steps * STEP
                    if height_here > 16:
                        multiply_square(rows_of_a, STEP, tiles, STEP, place, 64, 16 * stride, stride, steps, fresh)
                    else:
                        _multiply_16(rows_of_a, tiles, place, stride, steps, fresh)
                    if partial:
                        copy(out + i * of_out + 4 * j, of_out, edge, 128, height_here, right - j)
                if height_here < 32:
                    configure(configurations + 32 * 64)
    release()


@no_type_check
def multiply_all(job: int) -> int:
    """Computes the products of a job, see `matmul`, by all threads; the bits do not depend on how many."""
    by_blocks(job, read_state(MULTIPLY))
    return 0


@no_type_check
def work(job: int) -> int:
    """Takes part in a job of `multiply_all`."""
    workspace = begin(job)
    table = view(job + TABLE, argument(job, 0), ENTRIES, np.int64)
    turn_a, turn_b, add = argument(job, 1) != 0, argument(job, 2) != 0, argument(job, 3) != 0
    multiply_blocks(table, turn_a, turn_b, add, argument(job, 4) != 0, argument(job, HEIGHT), job + COUNTER, workspace)
    end(job, workspace)
    return 0
