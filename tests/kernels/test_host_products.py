"""Products that XLA leaves to this process: against numpy, gradients in place, errors, the same bits every time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.foreign import register
from mixtral_jax.kernels.host_layers import in_place_ffn, matmul
from mixtral_jax.kernels.host_products import add_product, multiply
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


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradients_of_a_product(engine):
    x, w, d_out = normal(9, 5), normal(5, 7, seed=1), normal(9, 7, seed=2)
    out, pull = jax.vjp(jax.jit(functools.partial(matmul, engine=engine)), x, w)
    expected, pulled = oracles.value_and_pull(lambda x, w: x @ w, (x, w), d_out)
    assert oracles.error(out, expected) < LIMITS[engine]
    assert max(oracles.error(a, b) for a, b in zip(pull(d_out), pulled, strict=True)) < LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_product_is_added_in_place(engine):
    total, a, b = normal(5, 7), normal(9, 5, seed=1), normal(9, 7, seed=2)
    program = jax.jit(functools.partial(add_product, engine=engine), donate_argnums=0).lower(total, a, b).compile()
    assert program.memory_analysis().alias_size_in_bytes == total.nbytes
    assert "copy(" not in program.as_text()
    assert oracles.error(program(jnp.asarray(total), a, b), total + a.T.astype(np.float64) @ b) < LIMITS[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradients_of_all_layers_meet_in_one_stack(engine):
    """Layers that carry the stack on give what separate matrices give, and leave the other layers' gradients alone."""
    stacks = (normal(LAYERS, EXPERTS, D_MODEL, D_FF), normal(LAYERS, EXPERTS, D_MODEL, D_FF, seed=1),
              normal(LAYERS, EXPERTS, D_FF, D_MODEL, seed=2))  # fmt: skip
    rows, d_out = normal(SIZES.sum(), D_MODEL, seed=3), normal(SIZES.sum(), D_MODEL, seed=4)
    order = [2, 0]  # layer 1 is not used

    def ours(rows, stacks):
        whole = jax.lax.stop_gradient(stacks)

        def body(carry, layer):
            out, carried = in_place_ffn(carry[0], jnp.asarray(SIZES), whole, layer, carry[1], engine)
            return (out / 10, carried), None

        return jax.lax.scan(body, (rows, stacks), jnp.asarray(order, jnp.int32))[0][0]

    def reference(rows, *stacks):
        for layer in order:
            gate, up, down = (stack[layer][np.repeat(np.arange(EXPERTS), SIZES)] for stack in stacks)
            hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", rows, gate)) * jnp.einsum("rd,rdf->rf", rows, up)
            rows = jnp.einsum("rf,rfd->rd", hidden, down) / 10
        return rows

    out, pull = jax.vjp(jax.jit(ours), rows, stacks)
    d_rows, d_stacks = pull(d_out)
    expected, pulled = oracles.value_and_pull(reference, (rows, *stacks), d_out)
    assert oracles.error(out, expected) < 2 * LIMITS[engine]
    for grad, wanted in zip((d_rows, *d_stacks), pulled, strict=True):
        assert oracles.error(grad, wanted) < 2 * LIMITS[engine]
    assert not any(np.any(grad[1]) for grad in d_stacks)


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
            return in_place_ffn(rows, sizes, jax.lax.stop_gradient(stacks), jnp.zeros((), jnp.int32), stacks, engine)[0]

        out, pull = jax.vjp(layer, rows, stacks)
        return out, pull(out), multiply(rows, rows, engine, "tn"), multiply(rows, rows, engine, "nt")

    first = jax.tree.map(np.array, work(rows, stacks))
    for _ in range(20):
        held = [jnp.zeros(rng.integers(1, 5000)) for _ in range(3)]  # other places in memory
        again = work(jnp.array(rows), jax.tree.map(jnp.array, stacks))
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
        del held


def test_what_a_foreign_function_raises_ends_the_program():
    def fails(*_):
        raise ValueError("three is no size")

    register("test_that_fails", fails)
    call = jax.jit(jax.ffi.ffi_call("test_that_fails", jax.ShapeDtypeStruct((2,), jnp.float32)))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"test_that_fails.*three is no size"):
        call().block_until_ready()
