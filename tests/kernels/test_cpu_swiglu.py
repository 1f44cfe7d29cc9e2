"""SwiGLU by the CPU engine, and its gradients, against float64 at every length of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles

engine = pytest.importorskip("mixtral_jax.kernels.cpu.swiglu", reason="Numba is not there, as on every ARM")
swiglu, swiglu_gradients = engine.swiglu, engine.swiglu_gradients


def arrays(rows, columns, scale=3.0):
    rng = np.random.default_rng(columns)
    gate, up, d_out = (rng.standard_normal((rows, columns)).astype(np.float32) for _ in range(3))
    return scale * gate, up, d_out


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_every_length_of_a_row(rows, columns):
    gate, up, d_out = arrays(rows, columns)

    def reference(gate, up):
        return gate / (1 + jnp.exp(-gate)) * up

    expected, pulled = oracles.value_and_pull(reference, (gate, up), d_out)
    found = [jax.jit(swiglu)(gate, up), *jax.jit(swiglu_gradients)(gate, up, d_out)]
    for actual, wanted in zip(found, (expected, *pulled, expected), strict=True):
        assert oracles.error(actual, wanted) < 1e-6


def test_large_gates_neither_overflow_nor_leak():
    gate = np.array([[-1e30, -200, -100, 100, 200, 1e30]], np.float32)
    one = np.ones_like(gate)
    np.testing.assert_allclose(jax.jit(swiglu)(gate, one), np.maximum(gate, 0), rtol=1e-6, atol=1e-6)
    d_gate, d_up, _ = jax.jit(swiglu_gradients)(gate, one, one)
    np.testing.assert_allclose(d_gate, gate > 0, atol=1e-5)
    np.testing.assert_allclose(d_up, np.maximum(gate, 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_stays_so(which):
    values = arrays(3, 20)
    values[which][1, 7] = np.nan
    found = jax.jit(swiglu_gradients)(*values)
    assert np.isnan(found[0][1, 7])
    assert np.isnan(found[1][1, 7]) == (which != 1)  # the gradient of `up` does not depend on it
    assert all(np.isfinite(np.delete(grads, 1, axis=0)).all() for grads in found)
