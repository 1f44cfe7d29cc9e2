"""Products that XLA leaves to this process: against numpy, experts in place, memory, the same bits every time."""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertStack, ExpertWeights, expert_ffn
from tests import oracles
from tests.tiny import ENGINES, LIMITS, tiny_batch, tiny_config, tiny_trainable

cpu = pytest.importorskip("mixtral_jax.kernels.cpu.matmul", reason="Numba is not there, as on every ARM")
add_product, grouped, multiply = cpu.add_product, cpu.grouped, cpu.multiply
LAYERS, EXPERTS, D_MODEL, D_FF = 3, 4, 12, 20
SIZES = np.array([5, 0, 17, 2], np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("transposes", ["nn", "nt", "tn"])
def test_products_equal_those_of_numpy(engine, transposes, leading):
    a, b = normal(*leading, 7, 5), normal(*leading, 5, 11, seed=1)
    turned = [x.swapaxes(-1, -2) if flag == "t" else x for x, flag in zip((a, b), transposes, strict=True)]
    out = jax.jit(functools.partial(multiply, engine=engine, transposes=transposes))(*turned)
    assert oracles.error(out, a.astype(np.float64) @ b) < LIMITS[engine]


@pytest.mark.parametrize("product", [cpu.matmul, cpu.exact_matmul])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradients_of_a_product(engine, product):
    x, w, d_out = normal(9, 5), normal(5, 7, seed=1), normal(9, 7, seed=2)
    out, pull = jax.vjp(jax.jit(functools.partial(product, engine=engine)), x, w)
    expected, pulled = oracles.value_and_pull(lambda x, w: x @ w, (x, w), d_out)
    assert oracles.error(out, expected) < LIMITS["xla" if product is cpu.exact_matmul else engine]
    assert max(oracles.error(a, b) for a, b in zip(pull(d_out), pulled, strict=True)) < LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_product_is_added_in_place(engine):
    total, a, b = normal(5, 7), normal(9, 5, seed=1), normal(9, 7, seed=2)
    program = jax.jit(functools.partial(add_product, engine=engine), donate_argnums=0).lower(total, a, b).compile()
    assert program.memory_analysis().alias_size_in_bytes == total.nbytes
    assert "copy(" not in program.as_text()
    assert oracles.error(program(jnp.asarray(total), a, b), total + a.T.astype(np.float64) @ b) < LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_experts_that_are_read_in_the_stack_of_all_layers(engine):
    """What separate matrices give, output and gradients, and no program cuts a layer's weights out of the stack."""
    stacks = (normal(LAYERS, EXPERTS, D_MODEL, D_FF), normal(LAYERS, EXPERTS, D_MODEL, D_FF, seed=1),
              normal(LAYERS, EXPERTS, D_FF, D_MODEL, seed=2))  # fmt: skip
    rows, d_out = normal(SIZES.sum(), D_MODEL, seed=3), normal(SIZES.sum(), D_MODEL, seed=4)

    def ours(rows, stacks):
        whole = jax.lax.stop_gradient(stacks)

        def body(rows, inputs):
            layer, weights = inputs
            stack = ExpertStack(*whole, layer)
            experts = ExpertWeights(*weights, stack)
            return expert_ffn(rows, jnp.asarray(SIZES), experts, ExpertOptions(engine)) / 10, None

        return jax.lax.scan(body, rows, (jnp.arange(LAYERS, dtype=jnp.int32), stacks))[0]

    def reference(rows, *stacks):
        for layer in range(LAYERS):
            gate, up, down = (stack[layer][np.repeat(np.arange(EXPERTS), SIZES)] for stack in stacks)
            hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", rows, gate)) * jnp.einsum("rd,rdf->rf", rows, up)
            rows = jnp.einsum("rf,rfd->rd", hidden, down) / 10
        return rows

    @jax.jit
    def both(rows, stacks, d_out):
        out, pull = jax.vjp(ours, rows, stacks)
        return out, pull(d_out)

    out, (d_rows, d_stacks) = both(rows, stacks, d_out)
    expected, pulled = oracles.value_and_pull(reference, (rows, *stacks), d_out)
    assert oracles.error(out, expected) < 3 * LIMITS[engine]
    for grad, wanted in zip((d_rows, *d_stacks), pulled, strict=True):
        assert oracles.error(grad, wanted) < 3 * LIMITS[engine]
    program = both.lower(rows, stacks, d_out).compile().as_text()
    cut = re.findall(rf"f32\[(?:1,)?{EXPERTS},(?:{D_MODEL},{D_FF}|{D_FF},{D_MODEL})\]\S* dynamic-slice\(", program)
    assert not cut


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("train", [{"microbatches": 2, "remat": "dots"}, {"remat": "full"}], ids=str)
def test_a_training_step_equals_that_of_xla(engine, train):
    """The first step's loss and gradient norm, and the parameters after three; without remat: `test_step.py`."""
    runs = []
    for matmul in (engine, "xla"):
        config = tiny_config(kernels={"matmul": matmul}, train=train, model={"num_layers": 3})
        trainable = tiny_trainable(config)
        assert trainable.architecture.runtime.experts == ("grouped_blocks" if matmul == "xla" else engine)
        state = trainable.start(trainable.architecture.init(0))
        for step in range(3):
            state, metrics = trainable.step(state, trainable.put(tiny_batch(config, step)))
            runs.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        runs.append(jax.tree.map(np.asarray, state.opt_state[1].mu))
    ours, theirs = runs[:4], runs[4:]
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=1e-5)
    assert max(jax.tree.leaves(jax.tree.map(oracles.error, ours[3], theirs[3]))) < 100 * LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bits_every_time(engine):
    """Resuming a run bit for bit rests on it: whatever lies where, and whatever else the threads do."""
    rng = np.random.default_rng(0)
    rows, weights = normal(1000, 96), (normal(8, 96, 200), normal(8, 96, 200), normal(8, 200, 96))
    sizes = jnp.asarray(np.bincount(rng.integers(8, size=1000), minlength=8), jnp.int32)

    @jax.jit
    def work(rows, weights):
        def layer(rows, weights):
            return expert_ffn(rows, sizes, ExpertWeights(*weights), ExpertOptions(engine))

        out, pull = jax.vjp(layer, rows, weights)
        return out, pull(out), multiply(rows, rows, engine, "tn"), multiply(rows, rows, engine, "nt")

    first = jax.tree.map(np.array, work(rows, weights))
    for _ in range(20):
        held = [jnp.zeros(rng.integers(1, 5000)) for _ in range(3)]  # other places in memory
        again = work(jnp.array(rows), jax.tree.map(jnp.array, weights))
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
        del held


@pytest.mark.parametrize("engine", ENGINES)
def test_programs_that_run_at_a_time(engine):
    """Each has a workspace of its own."""
    call = jax.jit(functools.partial(multiply, engine=engine))
    factors = [(normal(300, 200, seed=seed), normal(200, 250, seed=seed + 1)) for seed in range(4)]
    expected = [np.asarray(call(*pair)) for pair in factors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(lambda pair: np.asarray(call(*pair)), factors), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_calls_give_their_memory_back(engine):
    """One that lists 128 products takes 9 KiB."""
    rows, stack = jnp.ones((128, 4)), jnp.ones((1, 128, 4, 4))
    sizes, first = jnp.ones(128, jnp.int32), jnp.zeros((), jnp.int32)

    @jax.jit
    def work(rows):
        return jax.lax.scan(lambda x, _: (grouped(x, sizes, first, [stack], engine)[0] / 4, None), rows, length=1000)[0]

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    work(rows).block_until_ready()
    before = resident()
    for _ in range(10):
        work(rows).block_until_ready()
    assert resident() - before < 20e6
