"""The experts' kernels for GPUs, interpreted on a CPU, against each row with its own expert in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.gpu import triton_grouped
from mixtral_jax.kernels.gpu.triton_grouped import gmm, grouped_ffn, tgmm
from tests import oracles

D_MODEL, D_FF, ROWS = 22, 37, 90
GROUPS = {
    "uneven": [33, 1, 7, 40],
    "empty ones": [0, 30, 0, 9],
    "one has all": [0, 0, 90, 0],
    "multiples of blocks": [8, 16, 40, 24],
    "more than blocks": [1] * 40,
    "only padding": [0, 0, 0, 0],
    "one group": [77],
}
BLOCKS = {"small": (8, 16, 8), "dividing": (30, 37, 11), "larger than all": (128, 64, 32)}


@functools.cache
def output_and_gradients(block):
    """Compiled for the blocks of this name, which are set; new for every number of groups and type alone."""

    @jax.jit
    def both(sizes, d_out, *arrays):
        out, pull = jax.vjp(lambda rows, *w: grouped_ffn(rows, sizes, *w, True), *arrays)
        return out, pull(d_out)

    return both


@pytest.fixture
def block(monkeypatch, name):
    """Blocks of several sizes, those of the elementwise kernel as well; by name."""
    height, width, depth = BLOCKS[name]
    monkeypatch.setattr(triton_grouped, "BLOCK", (height, width, 2 * depth))  # half of it in types of 4 bytes
    monkeypatch.setattr(triton_grouped, "ELEMENTWISE_BLOCK", (height, width))
    return name


def by_row(rows, w_gate, w_up, w_down, expert_of_row):
    gate, up, down = (w[expert_of_row] for w in (w_gate, w_up, w_down))
    x = rows[: len(expert_of_row)]
    inner = jax.nn.silu(jnp.einsum("rd,rdf->rf", x, gate)) * jnp.einsum("rd,rdf->rf", x, up)
    return jnp.einsum("rf,rfd->rd", inner, down)


def arrays_of(sizes, dtype=np.float32):
    """Rows, the three matrices of each group, and gradients of the output."""
    rng = np.random.default_rng(0)
    w_in, w_out = (sizes.size, D_MODEL, D_FF), (sizes.size, D_FF, D_MODEL)
    shapes = [(ROWS, D_MODEL), w_in, w_in, w_out, (ROWS, D_MODEL)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    # What padding rows hold must reach nothing.
    used = int(sizes.sum())
    return [a.at[used:].set(jnp.nan) if a.ndim == 2 else a for a in arrays]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, np.float32) for name in BLOCKS), ("dividing", jnp.bfloat16)], ids=str
)
@pytest.mark.parametrize("groups", GROUPS)
def test_output_and_gradients_equal_each_row_with_its_expert(block, groups, dtype):
    sizes = np.array(GROUPS[groups], np.int32)
    used = sizes.sum()
    *arrays, d_out = arrays_of(sizes, dtype)

    out, (d_rows, *d_weights) = output_and_gradients(block)(jnp.asarray(sizes), d_out, *arrays)

    expected, (expected_rows, *expected_weights) = oracles.value_and_pull(
        lambda *a: by_row(*a, np.repeat(np.arange(sizes.size), sizes)), arrays, d_out[:used]
    )
    limit = 2e-6 if dtype == np.float32 else 0.02
    if used:
        assert oracles.error(out[:used], expected) < limit
        assert oracles.error(d_rows[:used], np.asarray(expected_rows)[:used]) < limit
        assert all(oracles.error(a, b) < limit for a, b in zip(d_weights, expected_weights, strict=True))
    for d in d_weights:
        np.testing.assert_array_equal(d[sizes == 0], 0)
    np.testing.assert_array_equal(out[used:], 0)
    np.testing.assert_array_equal(d_rows[used:], 0)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("groups", GROUPS)
def test_products_alone(block, groups):
    sizes = np.array(GROUPS[groups], np.int32)
    used, group_of_row = sizes.sum(), np.repeat(np.arange(sizes.size), sizes)
    rows, w, _, _, other = arrays_of(sizes)
    out = gmm([(rows, w), (2 * rows, w)], jnp.asarray(sizes), interpret=True)
    sums = tgmm(rows, other, jnp.asarray(sizes), rows.dtype, interpret=True)
    rows, w, other = map(np.asarray, (rows, w, other))
    expected = 3 * np.einsum("rd,rdf->rf", rows[:used], w[group_of_row])
    np.testing.assert_allclose(out, np.pad(expected, ((0, ROWS - used), (0, 0))), rtol=1e-4, atol=1e-4)
    expected = [rows[:used][group_of_row == g].T @ other[:used][group_of_row == g] for g in range(sizes.size)]
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 7, 8, 64])
def test_blocks_cover_every_row_once(block):
    for sizes in GROUPS.values():
        group, first, end = (np.asarray(a) for a in triton_grouped._row_blocks(jnp.asarray(sizes), ROWS, block))
        owner = np.full(ROWS, -1)
        for g, start, stop in zip(group, first, end, strict=True):
            mine = np.arange(start, max(start, min(start + block, stop)))
            assert np.all(owner[mine] == -1)
            owner[mine] = g
        padding = ROWS - sum(sizes)
        np.testing.assert_array_equal(owner, np.repeat(np.arange(len(sizes) + 1), [*sizes, padding]))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (20, 3), (8, 8), (3, 50)])
def test_every_place_of_a_grid_is_visited(first, second):
    places = [tuple(map(int, triton_grouped._place(jnp.int32(i), first, second))) for i in range(first * second)]
    assert sorted(places) == [(i, j) for i in range(first) for j in range(second)]
