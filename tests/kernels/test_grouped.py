"""The grouped products for GPUs, interpreted on a CPU, against each row with its own matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import grouped
from mixtral_jax.kernels.grouped import gmm
from tests import oracles

INNER, OUTER, ROWS = 22, 37, 90
GROUPS = {
    "uneven": [33, 1, 7, 40],
    "empty ones": [0, 30, 0, 9],
    "one has all": [0, 0, 90, 0],
    "multiples of blocks": [8, 16, 40, 24],
    "more than blocks": [1] * 40,
    "nobody": [0, 0, 0, 0],
    "one group": [77],
}
BLOCKS = {"small": (8, 16, 8), "dividing": (30, 37, 11), "larger than all": (128, 64, 32)}


def by_row(rows, matrices, group_of_row):
    return jnp.einsum("ri,rio->ro", rows[: len(group_of_row)], matrices[group_of_row])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("groups", GROUPS)
def test_equals_each_row_with_its_matrix(monkeypatch, groups, block, dtype):
    # Half the depth for 4 bytes: the block is given for 2.
    height, width, depth = BLOCKS[block]
    monkeypatch.setattr(grouped, "BLOCK", (height, width, depth * jnp.dtype(dtype).itemsize // 2))
    rng = np.random.default_rng(0)
    sizes = np.array(GROUPS[groups], np.int32)
    used = sizes.sum()
    shapes = [(ROWS, INNER), (sizes.size, INNER, OUTER), (ROWS, OUTER)]
    rows, matrices, d_out = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    # What nobody's rows hold must reach nothing.
    rows, d_out = (a.at[used:].set(jnp.nan) for a in (rows, d_out))

    out, pull = jax.vjp(jax.jit(lambda rows, matrices: gmm(rows, matrices, jnp.asarray(sizes), True)), rows, matrices)
    d_rows, d_matrices = pull(d_out)

    expected, (expected_rows, expected_matrices) = oracles.value_and_pull(
        lambda *a: by_row(*a, np.repeat(np.arange(sizes.size), sizes)), (rows, matrices), d_out[:used]
    )
    limit = 1e-6 if dtype == np.float32 else 5e-3
    if used:
        assert oracles.error(out[:used], expected) < limit
        assert oracles.error(d_rows[:used], np.asarray(expected_rows)[:used]) < limit
        assert oracles.error(d_matrices, expected_matrices) < limit
    np.testing.assert_array_equal(d_matrices[sizes == 0], 0)
    np.testing.assert_array_equal(out[used:], 0)
    np.testing.assert_array_equal(d_rows[used:], 0)


@pytest.mark.parametrize("block", [1, 7, 8, 64])
def test_blocks_cover_every_row_once(block):
    for sizes in GROUPS.values():
        group, first, end = (np.asarray(a) for a in grouped._row_blocks(jnp.asarray(sizes), ROWS, block))
        owner = np.full(ROWS, -1)
        for g, start, stop in zip(group, first, end, strict=True):
            mine = np.arange(start, max(start, min(start + block, stop)))
            assert np.all(owner[mine] == -1)
            owner[mine] = g
        nobody = ROWS - sum(sizes)
        np.testing.assert_array_equal(owner, np.repeat(np.arange(len(sizes) + 1), [*sizes, nobody]))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (20, 3), (8, 8), (3, 50)])
def test_every_place_of_a_grid_is_visited(first, second):
    places = [tuple(map(int, grouped._place(jnp.int32(i), first, second))) for i in range(first * second)]
    assert sorted(places) == [(i, j) for i in range(first) for j in range(second)]
