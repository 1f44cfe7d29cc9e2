"""The experts' kernels for Hopper GPUs, interpreted on a CPU, against each row with its own expert in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertStack, ExpertWeights, expert_ffn, stacked_ffn
from mixtral_jax.kernels.gpu.hopper_ffn import hopper_ffn
from mixtral_jax.kernels.gpu.hopper_grouped import Scaling, gated, gmm, matrices_of_blocks, tgmm
from mixtral_jax.kernels.gpu.hopper_ring import Tiling, place
from mixtral_jax.kernels.permutation import pad_groups
from tests import oracles
from tests.kernels.test_quantized import KINDS

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="needs JAX's interpreter of these kernels, of JAX 0.11 or later"
)
ROWS, INNER, OUTER = 256, 128, 256
CASES = {  # sizes, tiling, multiprocessors
    "one after the other, by columns": ([128, 0], Tiling(width=128, stages=2, neighbours=2, split=1), 1),
    "more than tiles": ([0, 128, 128], Tiling(width=128, stages=3, neighbours=2), 6),
}


def interpret():
    return plgpu.InterpretGPUParams(detect_races=True)


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.bfloat16)


def owners(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def exact(a):
    return np.asarray(a, np.float64)


@interpreted
@pytest.mark.parametrize(("sizes", "tiling", "processors"), CASES.values(), ids=CASES)
def test_products_equal_each_row_with_its_matrix(sizes, tiling, processors):
    groups, used = owners(sizes), sum(sizes)
    rows = normal(0, ROWS, INNER).at[used:].set(jnp.nan)  # what nobody's rows hold must reach nothing
    stack, other = normal(1, 5, INNER, OUTER), normal(2, ROWS, OUTER).at[used:].set(jnp.nan)
    first = 5 - len(sizes)
    matrices = stack[first:]
    how = {"tiling": tiling, "processors": processors, "interpret": interpret()}

    straight = gmm([(rows, stack)], jnp.asarray(sizes), first_matrix=jnp.int32(first), **how)
    turned = gmm(
        [(rows, m.swapaxes(1, 2)) for m in (matrices, 2 * matrices)], jnp.asarray(sizes), transposed=True, **how
    )
    sums = tgmm(rows, other, jnp.asarray(sizes), Scaling(jnp.float32), **how)

    expected = np.einsum("rk,rkn->rn", exact(rows[:used]), exact(matrices)[groups])
    assert oracles.error(straight[:used], expected) < 0.005
    assert oracles.error(turned[:used], 3 * expected) < 0.005
    for out in (straight, turned):
        np.testing.assert_array_equal(out[used:], 0)
    x, y = exact(rows[:used]), exact(other[:used])
    assert oracles.error(sums, [x[groups == g].T @ y[groups == g] for g in range(len(sizes))]) < 1e-5


@interpreted
def test_gate_and_up_in_one_pass():
    sizes = [0, 128]
    groups, used = owners(sizes), sum(sizes)
    rows, matrices = normal(0, ROWS, INNER), [normal(i, 2, INNER, OUTER, scale=INNER**-0.5) for i in (1, 2)]
    found = gated(
        rows, *matrices, jnp.asarray(sizes), tiling=Tiling(stages=3, neighbours=2), processors=3, interpret=interpret()
    )
    gate, up = (np.einsum("rk,rkn->rn", exact(rows[:used]), exact(m)[groups]) for m in matrices)
    for out, expected in zip(found, (gate, up, gate / (1 + np.exp(-gate)) * up), strict=True):
        assert oracles.error(out[:used], expected) < 0.005


@interpreted
def test_experts_and_their_gradients(monkeypatch):
    """Read in the middle of a stack of three layers; what the arrays of the layer itself hold is not looked at."""
    monkeypatch.setattr("mixtral_jax.kernels.gpu.hopper_ring.num_processors", lambda: 2)
    sizes = np.array([0, 101])
    groups, used, d_model, d_ff = owners(sizes), sizes.sum(), 256, 256
    rows, d_out = (normal(seed, used + 20, d_model).at[used:].set(jnp.nan) for seed in (0, 1))
    w_in, w_out = (2, d_model, d_ff), (2, d_ff, d_model)
    weights = [normal(seed, *shape, scale=d_model**-0.5) for seed, shape in ((2, w_in), (3, w_in), (4, w_out))]
    stack = ExpertStack(*(jnp.stack([w + 1, w, w - 1]) for w in weights), jnp.int32(1))

    def ours(x, *w):
        return hopper_ffn(x, jnp.asarray(sizes), ExpertWeights(*w, stack), interpret())[0]

    out, pull = jax.vjp(ours, rows, *(jnp.nan * w for w in weights))
    d_rows, *d_weights = pull(d_out)

    def by_row(x, *w):
        gate, up, down = (m[groups] for m in w)
        inner = jax.nn.silu(jnp.einsum("rd,rdf->rf", x[:used], gate)) * jnp.einsum("rd,rdf->rf", x[:used], up)
        return jnp.einsum("rf,rfd->rd", inner, down)

    expected, (expected_rows, *expected_weights) = oracles.value_and_pull(by_row, [rows, *weights], d_out[:used])
    assert oracles.error(out[:used], expected) < 0.02
    assert oracles.error(d_rows[:used], np.asarray(expected_rows)[:used]) < 0.02
    for found, right in zip(d_weights, expected_weights, strict=True):
        assert oracles.error(found, right) < 0.02
        np.testing.assert_array_equal(found[0], 0)
    for array in (out, d_rows):
        np.testing.assert_array_equal(array[used:], 0)


@interpreted
def test_gradients_in_a_stack_lie_in_the_layer_s_place(monkeypatch):
    """Those of the layer are what they are elsewhere; those of other layers, which come back first, are left alone."""
    monkeypatch.setattr("mixtral_jax.kernels.gpu.hopper_ring.num_processors", lambda: 2)
    sizes, width = jnp.array([128, 0]), 256
    rows, d_out = (normal(seed, 128, width) for seed in (0, 1))
    weights = [normal(seed, 2, width, width, scale=width**-0.5) for seed in (2, 3, 4)]
    gradient_stack = tuple(jnp.stack([w, w, w]) for w in weights)
    stack = ExpertStack(*gradient_stack, jnp.int32(1))

    def ours(x, gradient_stack):
        experts = ExpertWeights(*weights, stack, gradient_stack)
        return hopper_ffn(x, sizes, experts, interpret(), row_multiple=128)

    (out, handed_on), pull = jax.vjp(ours, rows, gradient_stack)
    before = tuple(normal(5 + n, *w.shape) for n, w in enumerate(gradient_stack))
    d_rows, d_stack = pull((d_out, before))
    plain = lambda x, *w: hopper_ffn(x, sizes, ExpertWeights(*w), interpret())[0]  # noqa: E731
    wanted, pull_plain = jax.vjp(plain, rows, *weights)
    wanted_rows, *wanted_weights = pull_plain(d_out)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(d_rows, wanted_rows)
    for found, own, old in zip(d_stack, wanted_weights, before, strict=True):
        np.testing.assert_array_equal(found, old.at[1].set(own))
    for given, handed in zip(gradient_stack, handed_on, strict=True):
        np.testing.assert_array_equal(given, handed)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_8_bits_are_multiplied_as_by_portable_blocks(monkeypatch, kind):
    """Which `test_quantized` holds against the scheme in numpy; then the same with gradients in a stack."""
    monkeypatch.setattr("mixtral_jax.kernels.gpu.hopper_ring.num_processors", lambda: 2)
    sizes, width = jnp.array([0, 101]), 256
    rng = np.random.default_rng(0)
    shapes = [(121, width)] * 2 + [(2, width, width)] * 3
    rows, d_out, *weights = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    rows, d_out = (x.at[101:].set(jnp.nan) for x in (rows, d_out))
    in_8_bits = partial(ExpertOptions, eight_bit=KINDS[kind])
    options = in_8_bits("hopper", interpret=interpret())

    def both(options):
        out, pull = jax.vjp(lambda x, *w: expert_ffn(x, sizes, ExpertWeights(*w), options), rows, *weights)
        return out, *pull(d_out)

    found, expected = both(options), both(in_8_bits("grouped_blocks", (8,)))
    for array, right in zip(found, expected, strict=True):
        assert oracles.error(array, right) < 1e-6  # sums in another order; of whole numbers none is rounded
        assert kind == "fp8" or np.array_equal(array, right)

    gradient_stack = tuple(jnp.stack([w, w, w]) for w in weights)

    def handing_on(x, gradient_stack):
        experts = ExpertWeights(*weights, ExpertStack(*gradient_stack, jnp.int32(1)), gradient_stack)
        return stacked_ffn(x, sizes, experts, options)

    (out, _), pull = jax.vjp(handing_on, rows, gradient_stack)
    before = tuple(jnp.full_like(w, n) for n, w in enumerate(gradient_stack))
    d_rows, d_stack = pull((d_out, before))
    np.testing.assert_array_equal(out, found[0])
    np.testing.assert_array_equal(d_rows, found[1])
    for array, own, old in zip(d_stack, found[2:], before, strict=True):
        np.testing.assert_array_equal(array, old.at[1].set(own))


def random_sizes(seed, num_rows):
    """Sizes of 1 to 9 groups, some of them empty; of the first seed all are, of the second none."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 10))
    share = rng.random(groups) * (rng.random(groups) < 0.6) + 1e-9
    sizes = np.floor(share / share.sum() * rng.integers(0, num_rows + 1)).astype(int)
    return {0: sizes * 0, 1: np.ones(40, int)}.get(seed, sizes)


@pytest.mark.parametrize("seed", range(8))
def test_every_row_has_a_place_in_its_padded_group(seed):
    num_rows, height = 300, 8 if seed % 2 else 128
    sizes = random_sizes(seed, num_rows)
    padding = jax.tree.map(np.asarray, pad_groups(jnp.asarray(sizes), num_rows, height))
    counts = -(-sizes // height) * height
    np.testing.assert_array_equal(padding.sizes, counts)
    starts, used = np.cumsum(counts) - counts, sizes.sum()
    ranks = np.concatenate([np.arange(size) for size in sizes])
    np.testing.assert_array_equal(padding.place[:used], starts[owners(sizes)] + ranks)
    assert len(padding.source) % height == 0
    assert np.all(padding.place[used:] >= len(padding.source))
    source = np.full(len(padding.source), num_rows)
    source[padding.place[:used]] = np.arange(used)
    np.testing.assert_array_equal(padding.source, source)

    blocks = np.asarray(matrices_of_blocks(jnp.asarray(counts), 7, len(source) // height, height))
    nobody = len(blocks) - counts.sum() // height
    np.testing.assert_array_equal(blocks, [*(7 + owners(counts // height)), *[-1] * nobody])


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(neighbours=3)])
@pytest.mark.parametrize("grid", [(2, 2), (34, 6), (20, 58)])
def test_every_tile_has_one_place(grid, tiling):
    i, j = jax.vmap(lambda index: place(index, grid, tiling))(np.arange(grid[0] * grid[1], dtype=np.int32))
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == list(itertools.product(*map(range, grid)))
