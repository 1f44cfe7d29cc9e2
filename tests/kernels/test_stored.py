"""Products with weights as they are stored, against float64: every type, length and number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import chosen_experts
from mixtral_jax.kernels.stored import EightBitWeights, Matrices, StoredExperts, matrices
from tests import oracles
from tests.tiny import host_threads

ONE = np.array(1, np.int32)
engine = pytest.importorskip("mixtral_jax.kernels.cpu.stored_matmul", reason="Numba is not there, as on every ARM")
SIZES = {"some": [2, 0, 5], "one has all": [0, 9, 0], "a row": [1, 0, 0], "none": [0, 0, 0], "many": [37, 0, 3]}


def held(weights: np.ndarray, kind: str) -> Matrices:
    if kind == "int8":
        return matrices(EightBitWeights.quantize(jnp.asarray(weights), summed=(2,)), experts=weights.shape[1])
    return Matrices(jnp.asarray(weights, kind))


def wide(stack: Matrices) -> np.ndarray:
    values = np.asarray(stack.values.astype(jnp.float32), np.float64)
    return values if stack.scale is None else values * np.asarray(stack.scale, np.float64)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("inner", "outer"), [(8, 16), (5, 3), (137, 101), (64, 530)])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_length_and_load(kind, inner, outer, sizes):
    rng = np.random.default_rng(outer)
    group_sizes, padding = SIZES[sizes], 2
    weights = rng.standard_normal((2, 3, inner, outer), np.float32)
    x = rng.standard_normal((sum(group_sizes) + padding, inner), np.float32)
    weights[1, np.array(group_sizes) == 0] = np.nan  # nobody asked for these
    weights[0] = np.nan
    if kind == "int8":
        weights = np.nan_to_num(weights)
    stack = held(weights, kind)
    run = jax.jit(
        lambda x, stack: engine.multiply_stored(x, jnp.array(group_sizes, jnp.int32), np.array(1, np.int32), [stack])
    )
    with host_threads(3):
        (found,) = run(x, stack)
    expert_of_row = np.repeat(np.arange(3), group_sizes)
    expected = np.einsum("rd,rdf->rf", x[:-padding].astype(np.float64), wide(stack)[1][expert_of_row])
    np.testing.assert_array_equal(found[-padding:], 0)
    assert oracles.error(found[:-padding], expected) < 1e-6 if len(expected) else True


@pytest.mark.parametrize("engine", [engine, chosen_experts], ids=["stored", "chosen"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_experts_equal_those_of_dequantized_weights(kind, engine):
    rng = np.random.default_rng(0)
    gate, up = (rng.standard_normal((1, 3, 24, 40), np.float32) for _ in range(2))
    stacks = [held(w, kind) for w in (gate, up, rng.standard_normal((1, 3, 40, 24), np.float32))]
    x, sizes = rng.standard_normal((21, 24), np.float32), np.array([3, 0, 18], np.int32)
    found = jax.jit(engine.stored_ffn)(x, sizes, StoredExperts(*stacks, layer=jnp.int32(0)))
    w_gate, w_up, w_down = (wide(stack)[0][np.repeat(np.arange(3), sizes)] for stack in stacks)
    a, b = (np.einsum("rd,rdf->rf", x.astype(np.float64), w) for w in (w_gate, w_up))
    assert oracles.error(found, np.einsum("rf,rfd->rd", a / (1 + np.exp(-a)) * b, w_down)) < 1e-6


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_row_gets_the_same_bits_whatever_rows_there_are(kind):
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((39, 150), np.float32), rng.standard_normal((1, 1, 150, 90), np.float32)
    multiply = jax.jit(
        lambda x: engine.multiply_stored(x, jnp.array([len(x)]), np.zeros_like(ONE), [held(weights, kind)])[0]
    )
    together = multiply(x)  # from a panel; fewer rows from where the weights lie
    for first, last in ((0, 1), (6, 9), (18, 39), (38, 39)):
        np.testing.assert_array_equal(multiply(x[first:last]), together[first:last])
