"""Products that XLA leaves to this process: against numpy, gradients in place, memory, the same bits every time."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.cpu.layers import collect, exact_matmul, in_place_ffn, matmul
from mixtral_jax.kernels.cpu.matmul import add_product, grouped, multiply
from tests import oracles
from tests.tiny import ENGINES, LIMITS, tiny_batch, tiny_config, tiny_trainable

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


@pytest.mark.parametrize("product", [matmul, exact_matmul])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradients_of_a_product(engine, product):
    x, w, d_out = normal(9, 5), normal(5, 7, seed=1), normal(9, 7, seed=2)
    out, pull = jax.vjp(jax.jit(functools.partial(product, engine=engine)), x, w)
    expected, pulled = oracles.value_and_pull(lambda x, w: x @ w, (x, w), d_out)
    assert oracles.error(out, expected) < LIMITS["xla" if product is exact_matmul else engine]
    assert max(oracles.error(a, b) for a, b in zip(pull(d_out), pulled, strict=True)) < LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_product_is_added_in_place(engine):
    total, a, b = normal(5, 7), normal(9, 5, seed=1), normal(9, 7, seed=2)
    program = jax.jit(functools.partial(add_product, engine=engine), donate_argnums=0).lower(total, a, b).compile()
    assert program.memory_analysis().alias_size_in_bytes == total.nbytes
    assert "copy(" not in program.as_text()
    assert oracles.error(program(jnp.asarray(total), a, b), total + a.T.astype(np.float64) @ b) < LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [[2, 0, 1], [2, 0]], ids=str)
def test_the_gradients_of_all_layers_meet_in_one_stack(engine, order):
    """Layers that carry the stack on give what separate matrices give, whatever was in the gradients' memory before."""
    stacks = (normal(LAYERS, EXPERTS, D_MODEL, D_FF), normal(LAYERS, EXPERTS, D_MODEL, D_FF, seed=1),
              normal(LAYERS, EXPERTS, D_FF, D_MODEL, seed=2))  # fmt: skip
    rows, d_out = normal(SIZES.sum(), D_MODEL, seed=3), normal(SIZES.sum(), D_MODEL, seed=4)
    of_rows = normal(SIZES.sum(), seed=5)
    memory = jax.tree.map(lambda x: np.full_like(x, np.nan), stacks) if len(order) == LAYERS else None

    def ours(rows, of_rows, stacks):
        whole = jax.lax.stop_gradient(stacks)

        def body(carry, layer):
            out, carried = in_place_ffn(carry[0], jnp.asarray(SIZES), of_rows, whole, layer, carry[1], engine)
            return (out / 10, carried), None

        out, carried = jax.lax.scan(body, (rows, stacks), jnp.asarray(order, jnp.int32))[0]
        return out if memory is None else collect(out, carried, memory)

    def reference(rows, of_rows, *stacks):
        for layer in order:
            gate, up, down = (stack[layer][np.repeat(np.arange(EXPERTS), SIZES)] for stack in stacks)
            hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", rows, gate)) * jnp.einsum("rd,rdf->rf", rows, up)
            rows = jnp.einsum("rf,rfd->rd", hidden, down) * of_rows[:, None] / 10
        return rows

    out, pull = jax.vjp(jax.jit(ours), rows, of_rows, stacks)
    d_rows, d_of_rows, d_stacks = pull(d_out)
    expected, pulled = oracles.value_and_pull(reference, (rows, of_rows, *stacks), d_out)
    assert oracles.error(out, expected) < 3 * LIMITS[engine]
    for grad, wanted in zip((d_rows, d_of_rows, *d_stacks), pulled, strict=True):
        assert oracles.error(grad, wanted) < 3 * LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("train", [{}, {"microbatches": 2}, {"remat": "dots"}, {"remat": "full"}], ids=str)
def test_a_training_step_equals_that_of_xla(engine, train):
    """The first step's loss and gradient norm, and the parameters after three."""
    runs = []
    for products in (engine, "xla"):
        config = tiny_config(kernels={"products": products}, train=train, model={"num_layers": 3})
        trainable = tiny_trainable(config)
        assert trainable.architecture.runtime.experts == ("blocked" if products == "xla" else engine)
        state = trainable.start(trainable.architecture.init(0))
        for step in range(3):
            state, metrics = trainable.step(state, trainable.put(tiny_batch(config, step)))
            runs.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        runs.append(jax.tree.map(np.asarray, state["opt_state"][1].mu))
    ours, theirs = runs[:4], runs[4:]
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=1e-5)
    assert max(jax.tree.leaves(jax.tree.map(oracles.error, ours[3], theirs[3]))) < 100 * LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bits_every_time(engine):
    """Resuming a run bit for bit rests on it: whatever lies where, and whatever else the threads do."""
    rng = np.random.default_rng(0)
    rows, stacks = normal(1000, 96), (normal(1, 8, 96, 200), normal(1, 8, 96, 200), normal(1, 8, 200, 96))
    sizes = jnp.asarray(np.bincount(rng.integers(8, size=1000), minlength=8), jnp.int32)

    @jax.jit
    def work(rows, stacks):
        def layer(rows, stacks):
            whole, first = jax.lax.stop_gradient(stacks), jnp.zeros((), jnp.int32)
            return in_place_ffn(rows, sizes, jnp.ones(1000), whole, first, stacks, engine)[0]

        out, pull = jax.vjp(layer, rows, stacks)
        return out, pull(out), multiply(rows, rows, engine, "tn"), multiply(rows, rows, engine, "nt")

    first = jax.tree.map(np.array, work(rows, stacks))
    for _ in range(20):
        held = [jnp.zeros(rng.integers(1, 5000)) for _ in range(3)]  # other places in memory
        again = work(jnp.array(rows), jax.tree.map(jnp.array, stacks))
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
