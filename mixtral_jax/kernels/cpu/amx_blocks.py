"""What attention on matrix units does with blocks of 32 x 32, see `amx_softmax`: makes, multiplies and writes them."""

from typing import no_type_check

from mixtral_jax.kernels.cpu.amx_softmax import clear_memory, write_tile
from mixtral_jax.kernels.cpu.amx_tiles import STEP, TILE, copy, multiply_square, pack
from mixtral_jax.kernels.cpu.intrinsics import compiled


@compiled
@no_type_check
def multiply_block(a: int, a_step: int, b: int, b_step: int, out: int, steps: int, fresh: bool) -> None:
    """Computes a block as a sum of products of factors that lie some bytes apart."""
    multiply_square(a, a_step, b, b_step, out, TILE, 2 * TILE, 64, steps, fresh)


@compiled
@no_type_check
def pack_along_head(source: int, stride: int, rows: int, head_dim: int, second: bool, target: int, edge: int) -> None:
    """Makes up to 32 positions a factor whose inner dimension is the head's, the first or the second."""
    if rows < 32:
        clear_memory(target, (head_dim + 31) // 32 * STEP)
    pack(source, stride, rows, head_dim, True, second, target, edge)


@compiled
@no_type_check
def pack_along_rows(source: int, stride: int, rows: int, head_dim: int, second: bool, target: int, edge: int) -> None:
    """Makes up to 32 positions a factor whose inner dimension is theirs, the first or the second."""
    for part in range((head_dim + 31) // 32):
        columns = min(32, head_dim - 32 * part)
        if columns < 32:
            clear_memory(target + part * STEP, STEP)
        pack(source + 128 * part, stride, columns, rows, False, not second, target + part * STEP, edge)


@compiled
@no_type_check
def write_block(
    block: int, factor: int, target: int, stride: int, rows: int, columns: int, turned: bool, edge: int
) -> None:
    """Writes the part of a block that is within the result, times factors of its columns."""
    for tile in range(4):
        i, j = tile // 2, tile % 2
        top, left = (16 * j, 16 * i) if turned else (16 * i, 16 * j)
        height, width = min(16, rows - top), min(16, columns - left)
        if height > 0 and width > 0:
            source, place = block + tile * TILE, target + top * stride + 4 * left
            whole = height == 16 and width == 16
            to, step = (place, stride) if whole else (edge, 64)
            if turned:
                write_tile(source, factor + 64 * j, to, step, 1)
            else:
                write_tile(source, factor + 64 * j, to, step, 0)
            if not whole:
                copy(place, stride, edge, 64, height, width)
