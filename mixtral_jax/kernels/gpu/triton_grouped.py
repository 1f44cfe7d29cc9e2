"""SwiGLU experts over rows sorted by expert, for GPUs: Pallas kernels that Triton compiles.

An expert's rows are cut into blocks that begin at its first row; what a block reaches beyond the expert's last row is
neither read nor written, so no two blocks write the same row and no expert needs padding. Padding rows cost no
products and, but for zeros in the results, no traffic: in between, their memory stays as it was found.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixtral_jax.precision import FULL

# Rows, columns and depth of a block in 2-byte types: 3 steps in flight take 144 KiB of a multiprocessor's shared memory
# (of 163 on A100, 227 on H100 and B200), and the sums half of the registers of 8 warps.
BLOCK = (128, 256, 64)
PARAMS = {"num_warps": 8, "num_stages": 3}
NEIGHBOURS = 8  # blocks of rows that share the columns that lie in the second-level cache
ELEMENTWISE_BLOCK = (32, 256)  # rows and columns


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    w_gate: Float[Array, "experts d_model d_ff"],
    w_up: Float[Array, "experts d_model d_ff"],
    w_down: Float[Array, "experts d_ff d_model"],
    interpret: bool,
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert, adding up in float32; see `expert_ffn`.

    Args:
        rows: sorted by expert.
        group_sizes: rows of each expert.
        w_gate, w_up, w_down: the experts.
        interpret: run the kernels step by step, on a CPU.

    Returns:
        One output a row, zeros in padding rows.
    """
    return _fwd(rows, group_sizes, w_gate, w_up, w_down, interpret)[0]


def _fwd(
    rows: Array, group_sizes: Array, w_gate: Array, w_up: Array, w_down: Array, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    gate, up = (gmm([(rows, w)], group_sizes, fill=False, interpret=interpret) for w in (w_gate, w_up))
    (inner,) = swiglu(gate, up, None, group_sizes, interpret)
    out = gmm([(inner, w_down)], group_sizes, interpret=interpret)
    return out, (rows, group_sizes, w_gate, w_up, w_down, gate, up)


def _bwd(interpret: bool, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, sizes, w_gate, w_up, w_down, gate, up = residuals
    d_inner = gmm([(d_out, w_down)], sizes, transposed=True, fill=False, interpret=interpret)
    inner, d_gate, d_up = swiglu(gate, up, d_inner, sizes, interpret)
    d_rows = gmm([(d_gate, w_gate), (d_up, w_up)], sizes, transposed=True, interpret=interpret)
    pairs = ((rows, d_gate), (rows, d_up), (inner, d_out))
    return d_rows, None, *(tgmm(left, right, sizes, w_gate.dtype, interpret=interpret) for left, right in pairs)


grouped_ffn.defvjp(_fwd, _bwd)


def gmm(
    pairs: Sequence[tuple[Float[Array, "rows inner"], Float[Array, "groups ..."]]],
    sizes: Int[Array, " groups"],
    *,
    transposed: bool = False,
    fill: bool = True,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Float[Array, "rows outer"]:
    """Multiplies every row with its group's matrix, and adds up over the pairs.

    Args:
        pairs: rows sorted by group, and matrices [groups, inner, outer], all pairs of the same shapes.
        sizes: rows of each group.
        transposed: whether the matrices are [groups, outer, inner].
        fill: whether padding rows are zeros; otherwise they are what the memory held.
        dtype: of the result; None: that of the rows.
        interpret: run the kernel step by step, on a CPU.
    """
    (num_rows, inner), (groups, *shape) = pairs[0][0].shape, pairs[0][1].shape
    outer, factors = shape[0 if transposed else 1], pairs[0][0].dtype
    height, width, depth = _block(factors)
    plan = _row_blocks(sizes, num_rows, height)
    grid = plan[0].size, -(-outer // width)

    def kernel(group_ref: Any, first_ref: Any, end_ref: Any, *refs: Any) -> None:
        block, column = _place(pl.program_id(0), *grid)
        group, first, end = group_ref[block], first_ref[block], end_ref[block]
        start, matrix = column * width, jnp.minimum(group, groups - 1)
        mine, columns = first + jnp.arange(height) < end, _inside(start, width, outer)
        sums = jnp.zeros((height, width), FULL)
        for rows_ref, matrices_ref in zip(refs[:-1:2], refs[1:-1:2], strict=True):

            def step(i: Array, sums: Array, rows_ref: Any = rows_ref, matrices_ref: Any = matrices_ref) -> Array:
                at = i * depth
                deep = _inside(at, depth, inner)
                x = _load(rows_ref.at[pl.ds(first, height), pl.ds(at, depth)], _both(mine, deep))
                if transposed:
                    w = _load(matrices_ref.at[matrix, pl.ds(start, width), pl.ds(at, depth)], _both(columns, deep))
                else:
                    w = _load(matrices_ref.at[matrix, pl.ds(at, depth), pl.ds(start, width)], _both(deep, columns))
                return sums + plgpu.dot(x, w, trans_b=transposed)

            steps = ((group < groups) & (first < end)).astype(jnp.int32) * -(-inner // depth)
            sums = jax.lax.fori_loop(0, steps, step, sums)
        written = mine if fill else mine & (group < groups)
        place = refs[-1].at[pl.ds(first, height), pl.ds(start, width)]
        plgpu.store(place, sums.astype(refs[-1].dtype), mask=_both(written, columns))

    name = "gmm" if fill else "gmm_unfilled"
    result = jax.ShapeDtypeStruct((num_rows, outer), dtype or factors)
    return _call(kernel, name, (grid[0] * grid[1],), result, interpret)(*plan, *(x for pair in pairs for x in pair))


def tgmm(
    left: Float[Array, "rows inner"],
    right: Float[Array, "rows outer"],
    sizes: Int[Array, " groups"],
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "groups inner outer"]:
    """Sums over every group's rows the products of each left element with each right one.

    Args:
        left, right: rows sorted by group.
        sizes: rows of each group.
        dtype: of the result.
        interpret: run the kernel step by step, on a CPU.
    """
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
        sums = jax.lax.fori_loop(0, steps, step, jnp.zeros((height, width), FULL))
        place = out_ref.at[group, pl.ds(i * height, height), pl.ds(j * width, width)]
        plgpu.store(place, sums.astype(dtype), mask=_both(above, below))

    result = jax.ShapeDtypeStruct((sizes.size, inner, outer), dtype)
    return _call(kernel, "tgmm", (grid[0] * grid[1], sizes.size), result, interpret)(ends - sizes, ends, left, right)


def multiply(
    rows: Float[Array, "rows inner"],
    weights: Float[Array, "groups inner outer"],
    sizes: Int[Array, " groups"],
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "rows outer"]:
    """Multiplies rows with one matrix a group, as megablox's function of that name; see `gmm`."""
    return gmm([(rows, weights)], sizes, dtype=dtype, interpret=interpret)


def outer_products(
    left: Float[Array, "rows inner"],
    right: Float[Array, "rows outer"],
    sizes: Int[Array, " groups"],
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "groups inner outer"]:
    """Sums over every group's rows, as megablox's function of that name; see `tgmm`."""
    return tgmm(left, right, sizes, dtype, interpret=interpret)


def swiglu(
    gate: Float[Array, "rows d_ff"],
    up: Float[Array, "rows d_ff"],
    d_inner: Float[Array, "rows d_ff"] | None,
    sizes: Int[Array, " groups"],
    interpret: bool,
) -> tuple[Float[Array, "rows d_ff"], ...]:
    """Computes silu(gate) * up and, given its gradient, those of gate and up; only in assigned rows.

    Args:
        gate, up: rows sorted by group.
        d_inner: gradient of the result; None: there is none.
        sizes: rows of each group.
        interpret: run the kernel step by step, on a CPU.
    """
    (num_rows, columns), dtype = gate.shape, gate.dtype
    height, width = ELEMENTWISE_BLOCK
    arrays = [gate, up] if d_inner is None else [gate, up, d_inner]

    def kernel(used_ref: Any, *refs: Any) -> None:
        row, column = pl.program_id(0) * height, pl.program_id(1) * width
        place = pl.ds(row, height), pl.ds(column, width)
        mask = _both(row + jnp.arange(height) < used_ref[0], _inside(column, width, columns))
        g, u, *d = (_load(ref.at[place], mask).astype(FULL) for ref in refs[: len(arrays)])
        share = 1 / (1 + jnp.exp(-g))
        results = [g * share * u]
        if d:
            results += [d[0] * u * share * (1 + g * (1 - share)), d[0] * g * share]
        for ref, result in zip(refs[len(arrays) :], results, strict=True):
            plgpu.store(ref.at[place], result.astype(dtype), mask=mask)

    result = (jax.ShapeDtypeStruct(gate.shape, dtype),) * (1 if d_inner is None else 3)
    grid = -(-num_rows // height), -(-columns // width)
    used = jnp.sum(sizes, keepdims=True, dtype=jnp.int32)
    in_place = {} if d_inner is None else {3: 0, 1: 1, 2: 2}  # d_inner, gate and up are not needed any more
    return _call(kernel, "swiglu", grid, result, interpret, in_place)(used, *arrays)


def _block(dtype: DTypeLike) -> tuple[int, int, int]:
    """Rows, columns and depth of a block; wider types get half of the depth."""
    return *BLOCK[:2], BLOCK[2] * 2 // max(2, jnp.dtype(dtype).itemsize)


def _row_blocks(sizes: Array, num_rows: int, block: int) -> tuple[Array, Array, Array]:
    """Finds group, first row and end of the rows of every block; the last group, of padding, takes what is left."""
    sizes = jnp.concatenate([sizes, num_rows - jnp.sum(sizes, keepdims=True)])
    ends, counts = jnp.cumsum(sizes), -(-sizes // block)
    last = jnp.cumsum(counts)
    index = jnp.arange(-(-num_rows // block) + sizes.size - 1, dtype=jnp.int32)  # as many as there can be
    group = jnp.searchsorted(last, index, side="right", method="compare_all")
    group = jnp.minimum(group, sizes.size - 1).astype(jnp.int32)
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


def _call(
    kernel: Any, name: str, grid: tuple[int, ...], result: Any, interpret: bool, in_place: dict[int, int] | None = None
) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=result,
        grid=grid,
        input_output_aliases=in_place or {},
        compiler_params=plgpu.CompilerParams(**PARAMS),
        interpret=interpret,
        name=name,
    )
