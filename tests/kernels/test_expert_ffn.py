"""Expert products on rows sorted by expert, each backend against float64 row by row: output and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights, expert_ffn
from mixtral_jax.kernels.grouped_blocks import BLOCK_SIZES, choose_block_sizes
from tests import oracles
from tests.tiny import LIMITS, by_engine

D_MODEL, D_FF, EXPERTS, ROWS = 6, 10, 4, 47
GROUPS = {
    "uneven": [13, 1, 7, 20],
    "empty ones": [0, 30, 0, 9],
    "one has all": [0, 0, 47, 0],
    "multiples of blocks": [8, 16, 4, 12],
    "only padding": [0, 0, 0, 0],
}
BACKENDS = [
    ("grouped_blocks", (8, 4, 3)),
    ("grouped_blocks", (64,)),
    ("grouped_blocks", (1,)),
    ("ragged_dot", ()),
    ("megablox", ()),
    ("triton", ()),
    by_engine("amx", "amx", ()),
    by_engine("mkl", "mkl", ()),
]


def by_row(rows, w_gate, w_up, w_down, expert_of_row):
    """Each row with its expert's matrices; padding rows are left out."""
    gate, up, down = (w[expert_of_row] for w in (w_gate, w_up, w_down))
    x = rows[: len(expert_of_row)]
    inner = jax.nn.silu(jnp.einsum("rd,rdf->rf", x, gate)) * jnp.einsum("rd,rdf->rf", x, up)
    return jnp.einsum("rf,rfd->rd", inner, down)


@functools.cache
def compiled(backend, block_sizes):
    """Output and gradients of (arrays, sizes, gradient of the output)."""

    @jax.jit
    def both(arrays, sizes, d_out):
        def run(rows, *weights):
            weights = ExpertWeights(*weights)
            return expert_ffn(rows, sizes, weights, ExpertOptions(backend, block_sizes, interpret=True))

        out, pull = jax.vjp(run, *arrays)
        return out, pull(d_out)

    return both


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("backend", "block_sizes"), BACKENDS, ids=str)
def test_equals_the_loop_over_rows(backend, block_sizes, groups):
    rng = np.random.default_rng(0)
    shapes = [(ROWS, D_MODEL), *[(EXPERTS, D_MODEL, D_FF)] * 2, (EXPERTS, D_FF, D_MODEL), (ROWS, D_MODEL)]
    *arrays, d_out = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    sizes = np.array(GROUPS[groups], np.int32)
    limit = LIMITS.get(backend, 1e-6)
    used = sizes.sum()
    d_out[used:] = 0  # nobody reads them

    out, grads = compiled(backend, block_sizes)(arrays, sizes, d_out)
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(grads[0]))
    expert_of_row = np.repeat(np.arange(EXPERTS), sizes)
    expected, expected_grads = oracles.value_and_pull(
        lambda *a: by_row(*a, expert_of_row), arrays, d_out[:used].astype(np.float64)
    )
    if used:
        assert oracles.error(np.asarray(out)[:used], expected) < limit
        assert oracles.error(np.asarray(grads[0])[:used], np.asarray(expected_grads[0])[:used]) < limit
    for grad, reference in zip(grads[1:], expected_grads[1:], strict=True):
        assert oracles.error(grad, reference) < limit


@pytest.mark.parametrize(
    ("rows", "experts", "sizes"), [(4096, 8, (512, 128, 32)), (4096, 32, (128, 32)), (66, 4, (32,))]
)
def test_blocks_are_no_larger_than_the_mean_load(rows, experts, sizes):
    assert choose_block_sizes(rows, experts) == sizes
    assert list(BLOCK_SIZES) == sorted(BLOCK_SIZES, reverse=True)
