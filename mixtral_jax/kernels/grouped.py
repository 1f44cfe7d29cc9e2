"""Products of rows sorted by group with their group's matrix, for GPUs: Pallas kernels that Triton compiles.

A group's rows are cut into blocks that begin at its first row; a block reaches past its last row without being stored
there, so no two blocks write the same row and no group needs padding. Rows of nobody are written as zeros. Empty groups
and the unused end of a buffer cost no products.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from mixtral_jax.precision import FULL

# Rows, columns and depth of a block in 2-byte types: 3 steps in flight take 144 KiB of a multiprocessor's shared memory
# (of 163 on A100, 227 on H100 and B200), and the sums half of the registers of 8 warps.
BLOCK = (128, 256, 64)
PARAMS = {"num_warps": 8, "num_stages": 3}
NEIGHBOURS = 8  # blocks of rows that share the columns that lie in the second-level cache


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def gmm(
    rows: Float[Array, "rows inner"],
    matrices: Float[Array, "groups inner outer"],
    sizes: Int[Array, " groups"],
    interpret: bool = False,
) -> Float[Array, "rows outer"]:
    """Multiplies every row with its group's matrix, adding up in float32.

    Args:
        rows: sorted by group; those beyond the sum of `sizes` belong to nobody and give zeros.
        matrices: of the groups.
        sizes: rows of each group.
        interpret: run the kernel step by step, on a CPU.
    """
    return _gmm(rows, matrices, sizes, transposed=False, interpret=interpret)


def _fwd(rows: Array, matrices: Array, sizes: Array, interpret: bool) -> tuple[Array, tuple[Array, ...]]:
    return gmm(rows, matrices, sizes, interpret), (rows, matrices, sizes)


def _bwd(interpret: bool, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = residuals
    d_rows = _gmm(d_out, matrices, sizes, transposed=True, interpret=interpret)
    return d_rows, _tgmm(rows, d_out, sizes, matrices.dtype, interpret=interpret), None


gmm.defvjp(_fwd, _bwd)


def _block(dtype: Any) -> tuple[int, int, int]:
    """Rows, columns and depth of a block; wider types get half of the depth."""
    return *BLOCK[:2], BLOCK[2] * 2 // max(2, dtype.itemsize)


def _row_blocks(sizes: Array, num_rows: int, block: int) -> tuple[Array, Array, Array]:
    """Finds group, first row and end of the rows of every block; the last group, of nobody, takes what is left."""
    sizes = jnp.concatenate([sizes, num_rows - jnp.sum(sizes, keepdims=True)])
    ends, counts = jnp.cumsum(sizes), -(-sizes // block)
    last = jnp.cumsum(counts)
    index = jnp.arange(-(-num_rows // block) + sizes.size - 1, dtype=jnp.int32)  # as many as there can be
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), sizes.size - 1).astype(jnp.int32)
    first = (ends - sizes)[group] + (index - (last - counts)[group]) * block  # beyond the end in blocks not needed
    return group, first.astype(jnp.int32), ends[group].astype(jnp.int32)


def _place(program: Array, num_first: int, num_second: int) -> tuple[Array, Array]:
    """Orders a grid's programs so that `NEIGHBOURS` of the first axis go through the second one together."""
    stripe = program // (NEIGHBOURS * num_second)
    height = jnp.minimum(num_first - stripe * NEIGHBOURS, NEIGHBOURS)
    within = program % (NEIGHBOURS * num_second)
    return stripe * NEIGHBOURS + within % height, within // height


def _inside(start: Array, block: int, size: int) -> Array | None:
    """Which of a block's positions exist; None where all of them do."""
    return None if size % block == 0 else start + jnp.arange(block) < size


def _both(rows: Array | None, columns: Array | None) -> Array | None:
    """A block's mask from those of its two sides."""
    if rows is None:
        return None if columns is None else columns[None]
    return rows[:, None] if columns is None else rows[:, None] & columns[None]


def _load(ref: Any, mask: Array | None) -> Array:
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)


def _gmm(rows: Array, matrices: Array, sizes: Array, *, transposed: bool, interpret: bool) -> Array:
    (num_rows, inner), groups = rows.shape, matrices.shape[0]
    outer = matrices.shape[1 if transposed else 2]
    height, width, depth = _block(rows.dtype)
    plan = _row_blocks(sizes, num_rows, height)
    grid = plan[0].size, -(-outer // width)

    def kernel(group_ref: Any, first_ref: Any, end_ref: Any, rows_ref: Any, matrices_ref: Any, out_ref: Any) -> None:
        block, column = _place(pl.program_id(0), *grid)
        group, first, end = group_ref[block], first_ref[block], end_ref[block]
        start, matrix = column * width, jnp.minimum(group, groups - 1)
        mine, columns = first + jnp.arange(height) < end, _inside(start, width, outer)

        def step(i: Array, sums: Array) -> Array:
            at = i * depth
            deep = _inside(at, depth, inner)
            x = _load(rows_ref.at[pl.ds(first, height), pl.ds(at, depth)], _both(mine, deep))
            if transposed:
                w = _load(matrices_ref.at[matrix, pl.ds(start, width), pl.ds(at, depth)], _both(columns, deep))
            else:
                w = _load(matrices_ref.at[matrix, pl.ds(at, depth), pl.ds(start, width)], _both(deep, columns))
            return sums + plgpu.dot(x, w, trans_b=transposed)

        steps = ((group < groups) & (first < end)).astype(jnp.int32) * -(-inner // depth)
        sums = jax.lax.fori_loop(0, steps, step, jnp.zeros((height, width), FULL))
        out = sums.astype(out_ref.dtype)
        plgpu.store(out_ref.at[pl.ds(first, height), pl.ds(start, width)], out, mask=_both(mine, columns))

    return _call(kernel, "gmm", grid[0] * grid[1], (num_rows, outer), rows.dtype, interpret)(*plan, rows, matrices)


def _tgmm(left: Array, right: Array, sizes: Array, dtype: Any, *, interpret: bool) -> Array:
    """Sums, over every group's rows, the products of the two sides' rows: [groups, left columns, right columns]."""
    inner, outer = left.shape[1], right.shape[1]
    height, width, depth = _block(left.dtype)
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    grid = -(-inner // height), -(-outer // width)

    def kernel(first_ref: Any, end_ref: Any, left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        group = pl.program_id(1)
        (i, j), first, end = _place(pl.program_id(0), *grid), first_ref[group], end_ref[group]
        above, below = _inside(i * height, height, inner), _inside(j * width, width, outer)

        def step(s: Array, sums: Array) -> Array:
            row = first + s * depth
            mine = row + jnp.arange(depth) < end
            x = _load(left_ref.at[pl.ds(row, depth), pl.ds(i * height, height)], _both(mine, above))
            y = _load(right_ref.at[pl.ds(row, depth), pl.ds(j * width, width)], _both(mine, below))
            return sums + plgpu.dot(x, y, trans_a=True)

        steps = (end - first + depth - 1) // depth
        out = jax.lax.fori_loop(0, steps, step, jnp.zeros((height, width), FULL)).astype(out_ref.dtype)
        place = out_ref.at[group, pl.ds(i * height, height), pl.ds(j * width, width)]
        plgpu.store(place, out, mask=_both(above, below))

    programs, shape = (grid[0] * grid[1], sizes.size), (sizes.size, inner, outer)
    return _call(kernel, "tgmm", programs, shape, dtype, interpret)(ends - sizes, ends, left, right)


def _call(kernel: Any, name: str, grid: Any, shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=grid,
        compiler_params=plgpu.CompilerParams(**PARAMS),
        interpret=interpret,
        name=name,
    )
