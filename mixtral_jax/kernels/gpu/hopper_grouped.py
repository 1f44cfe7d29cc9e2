"""Grouped products for Hopper GPUs.

Groups of rows begin at multiples of a tile's height, so that no row needs a mask; what pads a group is zeros, which add
nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from mixtral_jax.kernels.gpu.hopper_ring import Ring, Tile, Tiling, cut, load, place
from mixtral_jax.precision import FULL

TILING = Tiling()


class Scaling(NamedTuple):
    """What becomes of sums."""

    dtype: DTypeLike  # of the result
    rows: Float[Array, " rows"] | None = None  # each is multiplied with its own
    columns: Float[Array, "matrices outer"] | None = None  # the same, by matrix

    def arrays(self) -> list[Array]:
        """Returns what the kernel is given."""
        return [x for x in (self.rows, self.columns) if x is not None]

    def of(self, sums: Array, refs: Sequence[Any], at: tuple[Any, Any, Any], part: tuple[Any, Any]) -> Array:
        """Multiplies a part of a tile, which lies at those rows, matrix and columns."""
        rows, matrix, columns = at
        places = [(0, lambda ref: ref.at[rows].at[part[0]])] if self.rows is not None else []
        if self.columns is not None:
            places.append((1, lambda ref: ref.at[matrix, columns].at[part[1]]))
        for (axis, scales), ref in zip(places, refs, strict=True):
            sums = sums.astype(FULL) * lax.broadcast_in_dim(load(scales(ref)), sums.shape, (axis,))
        return sums


def gmm(
    pairs: Sequence[tuple[Num[Array, "rows inner"], Num[Array, "matrices ..."]]],
    sizes: Int[Array, " groups"],
    *,
    first_matrix: Int[Array, ""] | int = 0,
    transposed: bool = False,
    fill: bool = True,
    scaling: Scaling | None = None,
    tiling: Tiling = TILING,
    processors: int | None = None,
    interpret: Any = None,
) -> Float[Array, "rows outer"]:
    """Multiplies every row with its group's matrix, and adds up over the pairs.

    Args:
        pairs: one or two of rows sorted by group, and matrices [matrices, inner, outer]; all pairs of the same shapes.
        sizes: rows of each group, multiples of the tiling's height.
        first_matrix: that of the first group; those of the others follow.
        transposed: whether the matrices are [matrices, outer, inner], as factors of 8 bits must be.
        fill: whether padding rows are zeros; otherwise they are what the memory held.
        scaling: what becomes of the sums; None: a result of the factors' type.
        tiling: how to cut the product.
        processors: how many to run on; None: all of the device.
        interpret: how to run the kernel step by step, on a CPU.
    """
    (num_rows, inner), dtype = pairs[0][0].shape, pairs[0][0].dtype
    outer = pairs[0][1].shape[1 if transposed else 2]
    scaling = scaling or Scaling(dtype)
    grid, steps = (num_rows // tiling.height, outer // tiling.width), inner // tiling.depth
    matrix_of_block = matrices_of_blocks(sizes, first_matrix, grid[0], tiling.height)

    def tile(index: Array, matrix_ref: Any, *refs: Any) -> Tile:
        block, column = place(index, grid, tiling)
        matrix, somebody = jnp.maximum(matrix_ref[block], 0), matrix_ref[block] >= 0

        def send(step: Array, copy: Callable[..., None]) -> None:
            def one(pair: int, step: Array) -> None:
                deep, columns = cut(step, tiling.depth), cut(column, tiling.width)
                rows_ref, matrices_ref = refs[2 * pair], refs[2 * pair + 1]
                copy(0, rows_ref.at[cut(block, tiling.height), deep])
                copy(1, matrices_ref.at[(matrix, columns, deep) if transposed else (matrix, deep, columns)])

            if len(pairs) == 1:
                one(0, step)
            else:
                lax.cond(step < steps, lambda: one(0, step), lambda: one(1, step - steps))

        def results(rows: Any, columns: Any, sums: Array) -> list[tuple[Array, Any]]:
            mine = cut(block, tiling.height), cut(column, tiling.width)
            sums = scaling.of(sums, refs[2 * len(pairs) : -1], (mine[0], matrix, mine[1]), (rows, columns))
            return [(sums, refs[-1].at[mine].at[rows, columns])]

        return Tile(jnp.where(somebody, len(pairs) * steps, 0), send, results, somebody | fill)

    ring = Ring(tile, grid[0] * grid[1], 1, (False, transposed), tiling, dtype)
    result = jax.ShapeDtypeStruct((num_rows, outer), scaling.dtype)
    arrays = [*(x for p in pairs for x in p), *scaling.arrays()]
    return ring.kernel("hopper_gmm", result, scaling.dtype, processors, interpret)(matrix_of_block, *arrays)


def gated(
    rows: Float[Array, "rows inner"],
    gate_matrices: Float[Array, "matrices inner outer"],
    up_matrices: Float[Array, "matrices inner outer"],
    sizes: Int[Array, " groups"],
    *,
    first_matrix: Int[Array, ""] | int = 0,
    tiling: Tiling = TILING,
    processors: int | None = None,
    interpret: Any = None,
) -> list[Float[Array, "rows outer"]]:
    """Multiplies every row with both of its group's matrices; gives both and silu(gate) * up; see `gmm`."""
    (num_rows, inner), outer, dtype = rows.shape, gate_matrices.shape[2], rows.dtype
    half = tiling.width // 2  # columns of a tile are half those of the gate's and half those of up's
    grid, steps = (num_rows // tiling.height, outer // half), inner // tiling.depth

    def tile(index: Array, matrix_ref: Any, rows_ref: Any, *refs: Any) -> Tile:
        block, column = place(index, grid, tiling)
        matrix, somebody = jnp.maximum(matrix_ref[block], 0), matrix_ref[block] >= 0
        mine = cut(block, tiling.height), cut(column, half)

        def send(step: Array, copy: Callable[..., None]) -> None:
            deep = cut(step, tiling.depth)
            copy(0, rows_ref.at[mine[0], deep])
            for i, matrices_ref in enumerate(refs[:2]):
                copy(1, matrices_ref.at[matrix, deep, mine[1]], i)

        def results(rows: Any, columns: Any, gate: Array, up: Array) -> list[tuple[Array, Any]]:
            values = gate, up, gate / (1 + jnp.exp(-gate)) * up
            return [(value, ref.at[mine].at[rows, columns]) for value, ref in zip(values, refs[2:], strict=True)]

        return Tile(jnp.where(somebody, steps, 0), send, results, somebody)

    ring = Ring(tile, grid[0] * grid[1], 2, (False, False), tiling, dtype)
    result = [jax.ShapeDtypeStruct((num_rows, outer), dtype)] * 3
    arrays = matrices_of_blocks(sizes, first_matrix, grid[0], tiling.height), rows, gate_matrices, up_matrices
    return ring.kernel("hopper_gated", result, dtype, processors, interpret)(*arrays)


def tgmm(
    left: Num[Array, "..."],
    right: Num[Array, "..."],
    sizes: Int[Array, " groups"],
    scaling: Scaling,
    *,
    transposed: bool = False,
    into: tuple[Float[Array, "matrices inner outer"], Int[Array, ""] | int] | None = None,
    tiling: Tiling = TILING,
    processors: int | None = None,
    interpret: Any = None,
) -> Float[Array, "matrices inner outer"]:
    """Sums over every group's rows the products of each left element with each right one.

    Args:
        left, right: [rows, inner] and [rows, outer], rows sorted by group.
        sizes: rows of each group, multiples of the tiling's depth.
        scaling: what becomes of the sums; columns of one matrix for all groups.
        transposed: whether factors are [inner, rows] and [outer, rows], as those of 8 bits must be.
        into: matrices of that type, and that of the first group: they are written over and returned; None: new ones.
        tiling: how to cut the product.
        processors: how many to run on; None: all of the device.
        interpret: how to run the kernel step by step, on a CPU.
    """
    inner, outer, groups = *(x.shape[0 if transposed else 1] for x in (left, right)), sizes.size
    grid = inner // tiling.height, outer // tiling.width
    of_group = grid[0] * grid[1]
    counts = sizes // tiling.depth
    first = jnp.cumsum(counts) - counts

    def tile(index: Array, first_ref: Any, count_ref: Any, place_ref: Any, *refs: Any) -> Tile:
        group = lax.div(index, jnp.int32(of_group))
        i, j = place(lax.rem(index, jnp.int32(of_group)), grid, tiling)
        left_ref, right_ref, *scale_refs, out_ref = refs
        above, below, start = cut(i, tiling.height), cut(j, tiling.width), first_ref[group]

        def send(step: Array, copy: Callable[..., None]) -> None:
            deep = cut(start + step, tiling.depth)
            copy(0, left_ref.at[(above, deep) if transposed else (deep, above)])
            copy(1, right_ref.at[(below, deep) if transposed else (deep, below)])

        def results(rows: Any, columns: Any, sums: Array) -> list[tuple[Array, Any]]:
            sums = scaling.of(sums, scale_refs, (above, 0, below), (rows, columns))
            return [(sums, out_ref.at[place_ref[0] + group, above, below].at[rows, columns])]

        return Tile(count_ref[group], send, results, True)

    ring = Ring(tile, groups * of_group, 1, (not transposed, transposed), tiling, left.dtype)
    matrices, place_of_first = into or (None, 0)
    place_of_first = jnp.asarray(place_of_first, jnp.int32)[None]
    arrays = first.astype(jnp.int32), counts.astype(jnp.int32), place_of_first, left, right, *scaling.arrays()
    dtype = scaling.dtype
    if matrices is None:
        result = jax.ShapeDtypeStruct((groups, inner, outer), dtype)
        return ring.kernel("hopper_tgmm", result, dtype, processors, interpret)(*arrays)
    assert matrices.dtype == dtype
    target = jax.new_ref(matrices)
    ring.kernel("hopper_tgmm", (), dtype, processors, interpret)(*arrays, target)
    return jax.freeze(target)


def matrices_of_blocks(
    sizes: Int[Array, " groups"], first_matrix: Int[Array, ""] | int, num_blocks: int, height: int
) -> Int[Array, " blocks"]:
    """The matrix of each block of rows, -1 where the block is nobody's, if all sizes are multiples of `height`."""
    ends, blocks = jnp.cumsum(sizes) // height, jnp.arange(num_blocks)
    group = jnp.searchsorted(ends, blocks, side="right", method="compare_all")
    return jnp.where(group < sizes.size, first_matrix + group, -1).astype(jnp.int32)
