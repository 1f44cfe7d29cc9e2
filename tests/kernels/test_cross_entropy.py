"""Cross-entropy in chunks against float64: value, gradients, split vocabularies, and what memory it takes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.cross_entropy import cross_entropy_sums, token_losses
from tests import oracles
from tests.tiny import LIMITS, by_engine, mesh_of

BATCH, SEQ, D_MODEL, VOCAB = 4, 12, 8, 40
MESHES = {"one device": {}, "tensor": {"tensor": 8}, "all": {"data": 2, "expert": 2, "tensor": 2}, "fsdp": {"fsdp": 4}}
PLACES = [*((mesh, "xla") for mesh in MESHES), *(by_engine(engine, "one device", engine) for engine in ("amx", "mkl"))]


@functools.cache
def example():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, SEQ, D_MODEL)).astype(np.float32)
    head = rng.standard_normal((D_MODEL, VOCAB)).astype(np.float32)
    targets = rng.integers(VOCAB, size=(BATCH, SEQ)).astype(np.int32)
    targets[0, :4] = [0, VOCAB - 1, 4, 5]  # the edges of the vocabulary and of a device's part
    mask = rng.random((BATCH, SEQ)) < 0.6
    return tuple(jnp.asarray(a) for a in (x, head, targets, mask))


def total_of(**where):
    return lambda *arrays: cross_entropy_sums(*arrays, **where).nats


@pytest.mark.parametrize("chunk", [1, 5, 48, 1000])
@pytest.mark.parametrize(("mesh", "backend"), PLACES)
def test_sum_and_gradients_equal_the_reference(mesh, backend, chunk):
    x, head, targets, mask = example()
    total = total_of(mesh=mesh_of(**MESHES[mesh]), backend=backend, chunk=chunk)
    value, grads = jax.jit(jax.value_and_grad(lambda x, head: 3 * total(x, head, targets, mask), (0, 1)))(x, head)
    expected, expected_grads = oracles.value_and_pull(
        lambda x, head: 3 * jnp.sum(oracles.token_losses(x, head, targets) * mask), (x, head), 1.0
    )
    assert abs(value / expected - 1) < LIMITS[backend]
    assert max(oracles.error(a, b) for a, b in zip(grads, expected_grads, strict=True)) < LIMITS[backend]
    # Without a gradient it is a program of its own.
    assert abs(3 * jax.jit(total)(x, head, targets, mask) / expected - 1) < LIMITS[backend]


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize(("mesh", "backend"), PLACES)
def test_losses_of_tokens_equal_the_reference(mesh, backend, chunk):
    x, head, targets, _ = example()
    best = jnp.argmax(x @ head, axis=-1)
    targets = targets.at[1].set(best[1])  # a random target is seldom the likeliest
    where = {"mesh": mesh_of(**MESHES[mesh]), "backend": backend}
    scores = jax.jit(functools.partial(token_losses, **where, chunk=chunk))
    losses, greedy = scores(x, head, targets)
    np.testing.assert_array_equal(greedy, targets == best)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(losses.shape), jnp.float32)  # a gradient's, by token
    expected, expected_grads = oracles.value_and_pull(
        lambda x, head: oracles.token_losses(x, head, targets), (x, head), weights
    )
    assert oracles.error(losses, expected) < LIMITS[backend]
    grads = jax.jit(jax.grad(lambda x, head: jnp.sum(weights * scores(x, head, targets)[0]), (0, 1)))(x, head)
    assert max(oracles.error(a, b) for a, b in zip(grads, expected_grads, strict=True)) < LIMITS[backend]


@pytest.mark.parametrize(("mesh", "backend"), PLACES)
def test_entropies_and_hits_equal_the_reference_and_take_no_part_in_gradients(mesh, backend):
    x, head, targets, mask = example()
    likeliest = np.argmax(np.float64(x) @ np.float64(head), axis=-1)
    targets = targets.at[1].set(likeliest[1])  # a random target is seldom the likeliest
    sums = functools.partial(cross_entropy_sums, mesh=mesh_of(**MESHES[mesh]), backend=backend, chunk=5)
    (_, entropy, greedy), pull = jax.vjp(jax.jit(lambda x: tuple(sums(x, head, targets, mask))), x)
    logits = np.float64(x) @ np.float64(head)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.sum(np.exp(log_probs) * log_probs, where=np.asarray(mask)[..., None])
    assert abs(entropy / expected - 1) < LIMITS[backend]
    assert greedy == np.sum((targets == likeliest) & mask)
    assert not np.any(pull((jnp.zeros(()), jnp.ones(()), jnp.ones(())))[0])


def test_nothing_masked_in_is_zero():
    x, head, targets, mask = example()
    total = total_of(mesh=mesh_of(), backend="xla", chunk=5)
    value, grad = jax.value_and_grad(lambda x: total(x, head, targets, jnp.zeros_like(mask)))(x)
    assert value == 0
    assert not np.any(grad)


def test_large_logits_do_not_overflow():
    x, head, targets, mask = example()
    total = total_of(mesh=mesh_of(), backend="xla", chunk=5)
    value, grad = jax.value_and_grad(lambda x: total(x, head, targets, mask))(1e4 * x)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("rows", [1, 16])
def test_the_logits_of_all_tokens_never_exist(rows):
    seq, vocab, chunk = 256, 512, 32
    total = total_of(mesh=mesh_of(), backend="xla", chunk=chunk)
    shapes = [((rows, seq, 8), jnp.float32), ((8, vocab), jnp.float32), ((rows, seq), jnp.int32), ((rows, seq), bool)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments).compile()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"[a-z0-9]+\[([\d,]+)\]", program.as_text())]
    assert max(sizes) <= max(chunk * vocab, 8 * vocab, rows * seq * 8)
    assert program.memory_analysis().temp_size_in_bytes < 4 * rows * seq * vocab
