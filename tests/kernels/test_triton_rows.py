"""Kernels that move rows for GPUs, interpreted on a CPU, against the portable gathers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.gpu import triton_rows
from mixtral_jax.kernels.permutation import RowMover, combine_rows, dispatch_rows
from mixtral_jax.model.expert_parallel import at_multiples, in_blocks
from mixtral_jax.model.routing import capacity_plan, dropless_plan

TOKENS, EXPERTS = 21, 4
KERNELS = RowMover("triton", interpret=True)
# Columns, bytes of a program's tokens, experts of a token: whole rows of several tokens, of one, parts of one.
SHAPES = {
    "tokens": (64, 8192, 2),
    "a token": (64, 256, 1),
    "parts": (96, 128, 3),
    "uneven parts": (37, 64, 2),
    "one column": (1, 64, 2),
}
PLANS = {
    "dropless": lambda chosen: dropless_plan(chosen, EXPERTS, chosen.size),
    "multiples": lambda chosen: at_multiples(dropless_plan(chosen, EXPERTS, chosen.size), 16),
    "little room": lambda chosen: capacity_plan(chosen[None], EXPERTS, 3),
    "much room": lambda chosen: capacity_plan(chosen[None], EXPERTS, 3 * TOKENS),
    "blocks": lambda chosen: in_blocks(dropless_plan(chosen, EXPERTS, chosen.size), 2, chosen.size),
}
LOADS = {
    "random": lambda rng, k: np.argsort(rng.random((TOKENS, EXPERTS)))[:, :k],
    "some to nobody": lambda rng, k: rng.integers(0, EXPERTS + 1, (TOKENS, k)),
    "one expert": lambda rng, k: np.full((TOKENS, k), 2),
    "nobody": lambda rng, k: np.full((TOKENS, k), EXPERTS),
}


@functools.cache
def moved(shape, mover):
    """Rows of tokens, gradients back to them, sums of rows and all gradients, compiled for the tiles of a shape."""

    @jax.jit
    def all_of(plan, x, rows, weights):
        maps = plan.source, plan.row_of
        spread, pull = jax.vjp(lambda x: dispatch_rows(x, *maps, mover), x)
        sums, pull_sums = jax.vjp(lambda rows, weights: combine_rows(rows, weights, *maps, mover), rows, weights)
        return spread, pull(rows), sums, *pull_sums(x)

    return all_of


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLANS)
def test_rows_and_gradients_are_those_of_gathers(monkeypatch, shape, name, dtype):
    columns, tile, k = SHAPES[shape]
    monkeypatch.setattr(triton_rows, "TILE_BYTES", tile)
    monkeypatch.setattr(triton_rows, "NARROWEST", 32)
    rng = np.random.default_rng(0)
    for load in LOADS.values():
        plan = PLANS[name](jnp.asarray(load(rng, k), jnp.int32))
        x, rows = (jnp.asarray(rng.standard_normal((n, columns)), dtype) for n in (TOKENS, plan.source.size))
        weights = jnp.asarray(rng.standard_normal((TOKENS, k)), jnp.float32)
        wanted = moved(shape, RowMover())(plan, x, rows, weights)
        found = moved(shape, KERNELS)(plan, x, rows, weights)
        for a, b in zip(found[:3], wanted[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        # Rounded once, from products and sums in float32.
        d, filled = x.astype(np.float32), plan.source < plan.row_of.size
        token = jnp.where(filled, plan.source // k, 0)
        share = jnp.where(filled, weights.reshape(-1)[jnp.minimum(plan.source, plan.row_of.size - 1)], 0)
        np.testing.assert_array_equal(found[3], (share[:, None] * d[token]).astype(dtype))
        product = jnp.take(rows, plan.row_of, axis=0, mode="fill", fill_value=0).astype(np.float32) * d[:, None]
        np.testing.assert_allclose(found[4], jnp.sum(product, axis=2), rtol=1e-5, atol=1e-5)
        for a, b in zip(found[3:], wanted[3:], strict=True):
            assert a.dtype == b.dtype
            scale = 1 + np.abs(np.asarray(b, np.float32))
            limit = 1e-5 if dtype == np.float32 else 0.05
            assert np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)) / scale) < limit


def test_what_dropped_assignments_and_empty_rows_hold_reaches_nothing(monkeypatch):
    monkeypatch.setattr(triton_rows, "TILE_BYTES", 256)
    rng = np.random.default_rng(1)
    plan = PLANS["multiples"](jnp.asarray(LOADS["some to nobody"](rng, 2), jnp.int32))
    d_y = jnp.asarray(rng.standard_normal((TOKENS, 64)), jnp.float32)
    rows = jnp.where((plan.source < plan.row_of.size)[:, None], jnp.ones((plan.source.size, 64)), jnp.nan)
    d_rows, d_weights = triton_rows.combine_gradients(rows, jnp.ones((TOKENS, 2)), *plan[:2], d_y, interpret=True)
    assert np.isfinite(d_rows).all()
    assert np.isfinite(d_weights).all()
    assert not np.asarray(d_weights)[np.asarray(plan.row_of) >= plan.source.size].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_written_beside_the_results(monkeypatch, shape):
    """The interpreter leaves out what lies outside of an array; a GPU would write over other arrays."""
    columns, tile, k = SHAPES[shape]
    call, room = triton_rows._Shares.call, 4

    def with_room(self, kernel, name, results, interpret):
        larger = jax.tree.map(lambda r: jax.ShapeDtypeStruct([n + room for n in r.shape], r.dtype), results)

        def run(*arrays):
            def inside(found, result):
                rows, columns = result.shape
                assert np.isnan(found[rows:]).all()
                assert np.isnan(found[:, columns:]).all()
                return found[:rows, :columns]

            return jax.tree.map(inside, call(self, kernel, name, larger, interpret)(*arrays), results)

        return run

    monkeypatch.setattr(triton_rows, "TILE_BYTES", tile)
    monkeypatch.setattr(triton_rows._Shares, "call", with_room)
    rng = np.random.default_rng(2)
    for name in PLANS:
        plan = PLANS[name](jnp.asarray(LOADS["some to nobody"](rng, k), jnp.int32))
        x, rows = (jnp.asarray(rng.standard_normal((n, columns)), jnp.float32) for n in (TOKENS, plan.source.size))
        triton_rows.spread_rows(x, *plan[:2], interpret=True)
        triton_rows.combine_gradients(rows, jnp.ones((TOKENS, k)), *plan[:2], x, interpret=True)


@pytest.mark.parametrize(
    ("columns", "dtype", "tile"),
    [(4096, jnp.bfloat16, (1, 4096)), (6144, jnp.bfloat16, (1, 2048)), (512, jnp.bfloat16, (8, 512)),
     (64, jnp.float32, (32, 64)), (4096, jnp.float32, (1, 2048)), (224, jnp.bfloat16, (16, 256)),
     (4100, jnp.bfloat16, (1, 4096))],
)  # fmt: skip
def test_tiles_are_powers_of_two_of_whole_rows_or_parts(columns, dtype, tile):
    assert triton_rows._tile(columns, dtype) == tile
