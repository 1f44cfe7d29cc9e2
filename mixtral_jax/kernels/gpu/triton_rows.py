"""Token rows to expert rows and gradients back, for GPUs: Pallas kernels that Triton compiles and that go by tokens.

A gather by expert rows reads a token's row once for each of its experts, long after the caches have lost it. Here a
token is read once and written to all of its rows. Every program has some tokens, whose rows it writes, and a share of
all rows, of which it fills those that nobody has with zeros: each element is written once, whoever is first.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixtral_jax.precision import FULL

TILE_BYTES = 8192  # of the tokens of a program: 64 bytes a thread, as four loads that are in flight together
NARROWEST = 512  # columns of a chunk that are worth dividing a row without rest
PARAMS = {"num_warps": 4, "num_stages": 1}


def spread_rows(
    x: Float[Array, "tokens d_model"],
    source: Int[Array, " rows"],
    row_of: Int[Array, "tokens k"],
    interpret: bool = False,
) -> Float[Array, "rows d_model"]:
    """Writes every token to its rows; see `permutation.dispatch_rows`, whose results these are to the bit.

    Args:
        x: token activations.
        source: assignment of each row; `tokens * k` or more marks an empty row, which becomes zero.
        row_of: row of each assignment; `rows` or more marks a dropped one.
        interpret: run the kernel step by step, on a CPU.
    """
    work = _Shares(x, source, row_of)

    def kernel(x_ref: Any, source_ref: Any, row_of_ref: Any, out_ref: Any) -> None:
        tokens, mine = work.tokens()
        targets = work.targets(row_of_ref)
        rows_left, empty = work.empty(source_ref)
        for columns, exist in work.chunks():
            tile = _load(x_ref.at[_places(tokens, columns)], _both(mine, exist), 0)
            for target in targets:
                _store(out_ref.at[_places(target, columns)], tile, _both(target < work.rows, exist))
            _store(out_ref.at[_places(rows_left, columns)], jnp.zeros((), x.dtype), _both(empty, exist))

    result = jax.ShapeDtypeStruct((work.rows, work.columns), x.dtype)
    return work.call(kernel, "spread_rows", result, interpret)(x, source, row_of)


def combine_gradients(
    rows: Float[Array, "rows d_model"],
    weights: Float[Array, "tokens k"],
    source: Int[Array, " rows"],
    row_of: Int[Array, "tokens k"],
    d_y: Float[Array, "tokens d_model"],
    interpret: bool = False,
) -> tuple[Float[Array, "rows d_model"], Float[Array, "tokens k"]]:
    """Computes gradients of the rows and of the weights of `permutation.combine_rows`, adding up in float32.

    Args:
        rows: the experts' results.
        weights: of each assignment.
        source, row_of: see `spread_rows`.
        d_y: gradient of the tokens' sums.
        interpret: run the kernel step by step, on a CPU.
    """
    work = _Shares(d_y, source, row_of)

    def kernel(
        d_y_ref: Any, source_ref: Any, row_of_ref: Any, weights_ref: Any, rows_ref: Any, d_rows_ref: Any, sums_ref: Any
    ) -> None:
        tokens, mine = work.tokens()
        targets = work.targets(row_of_ref)
        rows_left, empty = work.empty(source_ref)
        shares = [_load(weights_ref.at[tokens, j], mine, 0).astype(FULL)[:, None] for j in range(work.k)]
        sums = [jnp.zeros(work.height, FULL)] * work.k
        for columns, exist in work.chunks():
            d = _load(d_y_ref.at[_places(tokens, columns)], _both(mine, exist), 0).astype(FULL)
            places = [(_places(target, columns), _both(target < work.rows, exist)) for target in targets]
            tiles = [_load(rows_ref.at[place], mask, 0) for place, mask in places]  # all in flight before one is used
            for (place, mask), share in zip(places, shares, strict=True):
                _store(d_rows_ref.at[place], (share * d).astype(rows.dtype), mask)
            _store(d_rows_ref.at[_places(rows_left, columns)], jnp.zeros((), rows.dtype), _both(empty, exist))
            sums = [total + jnp.sum(tile.astype(FULL) * d, axis=1) for total, tile in zip(sums, tiles, strict=True)]
        for j, total in enumerate(sums):
            plgpu.store(sums_ref.at[tokens, j], total.astype(weights.dtype), mask=mine)

    results = jax.ShapeDtypeStruct(rows.shape, rows.dtype), jax.ShapeDtypeStruct(weights.shape, weights.dtype)
    call = work.call(kernel, "combine_gradients", results, interpret)
    d_rows, d_weights = call(d_y, source, row_of, weights, rows)
    return d_rows, d_weights


class _Shares:
    """What each program of a kernel has: `height` tokens, in chunks of `width` columns, and its share of the rows."""

    def __init__(self, x: Array, source: Array, row_of: Array):
        (self.num_tokens, self.columns), self.rows, self.k = x.shape, source.size, row_of.shape[1]
        self.assignments = row_of.size
        self.height, self.width = _tile(self.columns, x.dtype)
        self.programs = -(-self.num_tokens // self.height)
        self.share = -(-self.rows // self.programs)

    def tokens(self) -> tuple[Array, Array]:
        """The program's tokens, and which of them exist."""
        tokens = pl.program_id(0) * self.height + jnp.arange(self.height)
        return tokens, tokens < self.num_tokens

    def targets(self, row_of_ref: Any) -> list[Array]:
        """Rows of the program's tokens, of each choice; the number of rows: none."""
        tokens, mine = self.tokens()
        return [_load(row_of_ref.at[tokens, j], mine, self.rows) for j in range(self.k)]

    def chunks(self) -> list[tuple[Array, Array | None]]:
        """Chunks of columns, and which of them exist; None: all of them."""
        starts = range(0, self.columns, self.width)
        whole = self.columns % self.width == 0
        chunks = [start + jnp.arange(self.width) for start in starts]
        return [(columns, None if whole else columns < self.columns) for columns in chunks]

    def empty(self, source_ref: Any) -> tuple[Array, Array]:
        """The program's share of the rows, and which of them nobody has."""
        place = jnp.arange(pl.next_power_of_2(self.share))
        rows = pl.program_id(0) * self.share + place
        mine = (place < self.share) & (rows < self.rows)
        return rows, _load(source_ref.at[rows], mine, 0) >= self.assignments

    def call(self, kernel: Any, name: str, results: Any, interpret: bool) -> Any:
        """The kernel, run by all programs."""
        return pl.pallas_call(
            kernel,
            out_shape=results,
            grid=(self.programs,),
            compiler_params=plgpu.CompilerParams(**PARAMS),
            interpret=interpret,
            name=name,
        )


def _tile(columns: int, dtype: DTypeLike) -> tuple[int, int]:
    """Tokens and columns of a tile, powers of two: whole rows of several tokens, or a part of a row."""
    most = TILE_BYTES // jnp.dtype(dtype).itemsize
    width = math.gcd(columns, most)
    if width < min(columns, NARROWEST):
        width = min(most, pl.next_power_of_2(columns))
    return max(1, most // pl.next_power_of_2(columns)), width


def _places(rows: Array, columns: Array) -> tuple[Array, Array]:
    """Indices of a tile whose rows lie anywhere."""
    return rows[:, None], columns[None]


def _both(rows: Array, columns: Array | None) -> Array:
    """A tile's mask from those of its two sides."""
    return rows[:, None] if columns is None else rows[:, None] & columns[None]


def _load(ref: Any, mask: Array, other: int) -> Array:
    return plgpu.load(ref, mask=mask, other=other)


def _store(place: Any, value: Array, mask: Array) -> None:
    plgpu.store(place, jnp.broadcast_to(value, place.shape), mask=mask)
