"""SwiGLU with weights by the host's functions, and its gradients, against float64 at every length of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.cpu.swiglu import swiglu, swiglu_gradients
from tests import oracles
from tests.tiny import ENGINES

pytestmark = pytest.mark.parametrize("engine", ENGINES)  # either of them makes the host ready


def arrays(rows, columns, scale=3.0):
    rng = np.random.default_rng(columns)
    gate, up, d_out = (rng.standard_normal((rows, columns)).astype(np.float32) for _ in range(3))
    return scale * gate, up, rng.standard_normal(rows).astype(np.float32), d_out


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_every_length_of_a_row(engine, rows, columns):
    gate, up, weights, d_out = arrays(rows, columns)

    def reference(gate, up, weights):
        return gate / (1 + jnp.exp(-gate)) * up * weights[:, None]

    expected, pulled = oracles.value_and_pull(reference, (gate, up, weights), d_out)
    found = [jax.jit(swiglu)(gate, up, weights), *jax.jit(swiglu_gradients)(gate, up, weights, d_out)]
    for actual, wanted in zip(found, (expected, *pulled, expected), strict=True):
        assert oracles.error(actual, wanted) < 1e-6


def test_large_gates_neither_overflow_nor_leak(engine):
    gate = np.array([[-1e30, -200, -100, 100, 200, 1e30]], np.float32)
    one = np.ones_like(gate)
    out = jax.jit(swiglu)(gate, one, np.ones(1, np.float32))
    np.testing.assert_allclose(out, np.maximum(gate, 0), rtol=1e-6, atol=1e-6)
    d_gate, d_up, _, _ = jax.jit(swiglu_gradients)(gate, one, np.ones(1, np.float32), one)
    np.testing.assert_allclose(d_gate, gate > 0, atol=1e-5)
    np.testing.assert_allclose(d_up, np.maximum(gate, 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1, 3])
def test_what_is_not_a_number_stays_so(engine, which):
    values = arrays(3, 20)
    values[which][1, 7] = np.nan
    found = jax.jit(swiglu_gradients)(*values)
    assert np.isnan(found[0][1, 7])
    assert np.isnan(found[1][1, 7]) == (which != 1)  # the gradient of `up` does not depend on it
    assert np.isnan(found[2][1])
    assert all(np.isfinite(np.delete(grads, 1, axis=0)).all() for grads in found)
