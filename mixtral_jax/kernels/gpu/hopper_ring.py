"""How products run on Hopper GPUs, in Pallas's Mosaic backend: the matrix units fed from shared memory, all the time.

Every multiprocessor runs one program for the whole product and takes one tile of the result after the other. One of
its three warpgroups only copies: it fills a ring of stages in shared memory and runs ahead into the next tile while the
other two, each with its part of the tile in its registers, still multiply or store.
"""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from mixtral_jax.kernels.backends import HOPPER_HEIGHT, HOPPER_WIDTH
from mixtral_jax.precision import FULL

MULTIPLIERS = 2  # warpgroups that multiply
SWIZZLE = 128  # bytes of a row that lie together in shared memory
COPIER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232  # of a thread; 512 for one of each of the three warpgroups
STORES = 2  # parts of a tile that are on their way out of shared memory, of each warpgroup


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: 4 stages of 128 x 64 and 64 x 256 bfloat16, and the stores, take 224 of 227 KiB."""

    height: int = HOPPER_HEIGHT  # of a tile of the result; groups of rows are padded to it
    width: int = HOPPER_WIDTH
    depth: int = 64  # of a stage
    stages: int = 4
    neighbours: int = 16  # tiles below each other that share columns in the second-level cache
    split: int = 0  # axis of a tile that the two multiplying warpgroups divide


class Tile(NamedTuple):
    """One tile of a result."""

    steps: Array  # stages that it adds up
    send: Callable[[Array, Callable[..., None]], None]  # calls the given function with each block of a step's factors
    results: Callable[..., list[tuple[Array, Any]]]  # what goes where, given rows, columns and the sums of each product
    written: Array | bool


@dataclass(frozen=True)
class Ring:
    """A product as every multiprocessor computes its share of the tiles."""

    tile: Callable[..., Tile]
    num_tiles: int
    products: int  # with one left factor and as many right ones, that divide the width
    turned: tuple[bool, bool]  # whether the left, the right factor lies transposed in memory
    tiling: Tiling
    dtype: DTypeLike  # of the factors

    def kernel(self, name: str, result: Any, dtype: DTypeLike, processors: int | None, interpret: Any) -> Any:
        """Builds the kernel; `dtype` is that of all results, and of what it writes over."""
        tiling = self.tiling
        sides = [(1, tiling.height, tiling.depth), (self.products, tiling.depth, tiling.width // self.products)]
        left, right = (
            plgpu.SMEM(
                (tiling.stages, count, *(side[::-1] if turned else side)), self.dtype, transforms=_layout(self.dtype)
            )
            for (count, *side), turned in zip(sides, self.turned, strict=True)
        )
        height, width = self.part
        parts = (MULTIPLIERS, STORES, min(height, 64), min(width, SWIZZLE // jnp.dtype(dtype).itemsize))
        scratch = [
            left,
            right,
            plgpu.SMEM(parts, dtype, transforms=_layout(dtype)),
            plgpu.Barrier(num_arrivals=1 + self.products, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=tiling.stages),
        ]

        def body(*refs: Any) -> None:
            pl.run_scoped(partial(self.run, *refs), *scratch, collective_axes="warpgroup")

        return pl.kernel(
            body,
            result,
            mesh=plgpu.Mesh(
                grid=(processors or num_processors(),),
                grid_names=("processor",),
                num_threads=MULTIPLIERS + 1,
                thread_name="warpgroup",
                kernel_name=name,
            ),
            name=name,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=interpret,
        )

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of one product's tile that one warpgroup computes."""
        height, width, split = self.tiling.height, self.tiling.width // self.products, self.tiling.split
        return (height, width // MULTIPLIERS) if split else (height // MULTIPLIERS, width)

    def run(self, *refs: Any) -> None:
        """Runs the kernel's body: every warpgroup its role."""
        *arrays, left, right, outgoing, filled, freed = refs
        me, stride = lax.axis_index("processor"), lax.axis_size("processor")
        warpgroup = lax.axis_index("warpgroup")

        def tiles(body: Callable[[Tile, Array], None]) -> Array:
            """Calls the body with each tile of this multiprocessor and the number of stages before it; counts all."""

            def one(i: Array, done: Array) -> Array:
                tile = self.tile(me + i * stride, *arrays)
                body(tile, done)
                return done + tile.steps

            count = lax.div(jnp.int32(self.num_tiles - 1 + stride) - me, jnp.int32(stride))
            return lax.fori_loop(0, count, one, jnp.int32(0))

        def copier() -> None:
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            done = tiles(lambda tile, done: self.fill(tile, done, left, right, filled, freed))
            # Nobody may end while others still signal at its barriers.
            lax.fori_loop(jnp.maximum(done - self.tiling.stages, 0), done, lambda i, _: self.wait(freed, i), None)

        def multiplier() -> None:
            plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
            tiles(lambda tile, done: self.multiply(tile, done, warpgroup, left, right, outgoing, filled, freed))
            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup < MULTIPLIERS, multiplier, copier)

    def fill(self, tile: Tile, done: Array, left: Any, right: Any, filled: Any, freed: Any) -> None:
        """Copies the factors of a tile into the ring, stage by stage as they become free."""
        stages = self.tiling.stages

        def one(step: Array, _: None) -> None:
            total = done + step
            slot = lax.rem(total, jnp.int32(stages))
            pl.when(total >= stages)(lambda: plgpu.barrier_wait(freed.at[slot]))

            def copy(side: int, block: Any, product: int = 0) -> None:
                plgpu.copy_gmem_to_smem(block, (left, right)[side].at[slot, product], filled.at[slot])

            tile.send(step, copy)

        lax.fori_loop(0, tile.steps, one, None)

    def multiply(
        self, tile: Tile, done: Array, warpgroup: Array, left: Any, right: Any, outgoing: Any, filled: Any, freed: Any
    ) -> None:
        """Adds up one warpgroup's part of a tile, and sends it out of the registers while the next tile begins."""
        height, width = self.part
        row, column = (warpgroup * 0, warpgroup * width) if self.tiling.split else (warpgroup * height, warpgroup * 0)

        def factor(ref: Any, at: tuple[Any, Any], sides: tuple[Any, Any], turned: bool) -> Any:
            return ref.at[(*at, *sides[::-1])].transpose((1, 0)) if turned else ref.at[(*at, *sides)]

        def add_up(*sums: Any) -> list[Array]:
            def one(step: Array, _: None) -> None:
                slot = lax.rem(done + step, jnp.int32(self.tiling.stages))
                plgpu.barrier_wait(filled.at[slot])
                a = factor(left, (slot, 0), (pl.ds(row, height), slice(None)), self.turned[0])
                for product, total in enumerate(sums):
                    b = factor(right, (slot, product), (slice(None), pl.ds(column, width)), self.turned[1])
                    plgpu.wgmma(total, a, b)
                plgpu.wgmma_wait(len(sums))  # the step before is done
                pl.when(step > 0)(lambda: self.release(freed, done + step - 1))

            lax.fori_loop(0, tile.steps, one, None)
            values = [total[...] for total in sums]
            pl.when(tile.steps > 0)(lambda: self.release(freed, done + tile.steps - 1))
            return values

        sums_of = jnp.int32 if jnp.issubdtype(self.dtype, jnp.integer) else FULL
        values = pl.run_scoped(add_up, *[plgpu.ACC((height, width), jnp.dtype(sums_of))] * self.products)

        @pl.when(tile.written)
        def _() -> None:
            tall, wide = outgoing.shape[2:]
            number = 0
            for values_of, place in tile.results(pl.ds(row, height), pl.ds(column, width), *values):
                for i, j in itertools.product(range(0, height, tall), range(0, values_of.shape[1], wide)):
                    plgpu.wait_smem_to_gmem(STORES - 1, wait_read_only=True)
                    part = outgoing.at[warpgroup, number % STORES]
                    part[...] = values_of[i : i + tall, j : j + wide].astype(part.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(part, place.at[pl.ds(i, tall), pl.ds(j, wide)])
                    number += 1
            assert number % STORES == 0  # the next tile begins with the part that has been on its way the longest

    def wait(self, barriers: Any, step: Array) -> None:
        """Waits at a stage's barrier."""
        plgpu.barrier_wait(barriers.at[lax.rem(step, jnp.int32(self.tiling.stages))])

    def release(self, freed: Any, step: Array) -> None:
        """Tells the copier that this warpgroup needs a stage no more."""
        plgpu.barrier_arrive(freed.at[lax.rem(step, jnp.int32(self.tiling.stages))])


def num_processors() -> int:
    """Multiprocessors of the GPU; of an H100 or H200 where a program is compiled without one."""
    return getattr(jax.devices()[0], "core_count", 132) if jax.default_backend() == "gpu" else 132


def place(index: Array, grid: tuple[int, int], tiling: Tiling) -> tuple[Array, Array]:
    """Orders a result's tiles so that those computed at the same time share rows and columns."""
    i, j = plgpu.planar_snake(index, grid, 0, tiling.neighbours)
    return i, j


def load(ref: Any) -> Array:
    """Reads a few numbers from the device's memory straight into registers."""
    whole = [()] if "idx" in inspect.signature(plgpu.load).parameters else []  # before JAX 0.12
    numbers: Array = plgpu.load(ref, *whole, optimized=False)
    return numbers


def cut(index: Array, size: int) -> Any:
    """The block of that number, of blocks of that size."""
    return pl.ds(pl.multiple_of(index * size, size), size)


def _layout(dtype: DTypeLike) -> tuple[Any, ...]:
    return plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(SWIZZLE)
