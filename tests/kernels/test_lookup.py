"""Rows of a table, whose gradient is the sum over every use, whatever repeats, is missing or lies beyond the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.lookup import look_up

CASES = {
    "repeated": [3, 0, 3, 3, 1, 0, 9, 3],
    "one row alone": [4] * 8,
    "none of the first and last": [2, 5, 2, 5, 5, 5, 2, 7],
    "beyond the table": [10, 3, 11, 3, 10, 10, 0, 9],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_rows_and_their_gradients_are_those_of_a_sum(rows):
    rng = np.random.default_rng(0)
    table, d_out = rng.standard_normal((10, 4)), rng.standard_normal((2, 4, 4))
    expected, d_table = np.zeros((2, 4, 4)), np.zeros((10, 4))
    for place, row in zip(np.ndindex(2, 4), rows, strict=True):
        if row < 10:
            expected[place], d_table[row] = table[row], d_table[row] + d_out[place]
    out, pull = jax.vjp(lambda t: look_up(t, jnp.asarray(rows).reshape(2, 4)), jnp.asarray(table, jnp.float32))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.asarray(d_out, jnp.float32))[0], d_table, rtol=1e-5, atol=1e-6)


def test_the_gradient_scatters_nothing():
    table, rows = jnp.ones((50, 4)), jnp.arange(32) % 7
    both = jax.jit(lambda t, d: jax.vjp(lambda t: look_up(t, rows), t)[1](d))
    assert "scatter" not in both.lower(table, jnp.ones((32, 4))).as_text()
