"""What losses need of logits, by the CPU engine: against float64, at every length of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

softmax = pytest.importorskip("mixtral_jax.kernels.cpu.softmax", reason="Numba is not there, as on every ARM")
differentiate, summarize = softmax.differentiate, softmax.summarize


def logits_of(rows, vocab, scale=5.0):
    rng = np.random.default_rng(vocab)
    return (scale * rng.standard_normal((rows, vocab))).astype(np.float32), rng.integers(vocab, size=rows)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 31, 100, 1000])
@pytest.mark.parametrize("rows", [1, 8, 37])
def test_every_length_of_a_row(rows, vocab):
    logits, targets = logits_of(rows, vocab)
    mask = np.arange(rows) % 3 != 1
    found, grads = jax.jit(differentiate)(logits, targets, mask)
    wide = logits.astype(np.float64)
    log_total = np.log(np.sum(np.exp(wide - wide.max(1, keepdims=True)), axis=1)) + wide.max(1)
    expected = np.exp(wide - log_total[:, None]) - (np.arange(vocab) == targets[:, None])
    np.testing.assert_allclose(grads, expected * mask[:, None], atol=5e-7)
    for rows_of in (found, jax.jit(summarize)(logits, targets)):
        np.testing.assert_allclose(rows_of.log_total, log_total, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(rows_of.at_target, logits[np.arange(rows), targets])
        np.testing.assert_array_equal(rows_of.peak, logits.max(1))


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0, -1e4], [-1e4, -1e4, -1e4]], np.float32)
    found, grads = jax.jit(differentiate)(jnp.asarray(logits), np.array([0, 1]), np.array([True, True]))
    np.testing.assert_allclose(found.log_total, [1e4, -1e4 + np.log(3)])
    np.testing.assert_allclose(grads, [[0, 0, 0], [1 / 3, -2 / 3, 1 / 3]], atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
    logits, targets = logits_of(4, 50)
    logits[2, 7] = value
    found, grads = jax.jit(differentiate)(jnp.asarray(logits), targets, np.ones(4, bool))
    finite = np.isfinite(found.log_total)
    np.testing.assert_array_equal(finite, [True, True, False, True])
    np.testing.assert_array_equal(np.isfinite(grads).all(1), finite)


def test_the_gradient_lies_where_the_logits_were():
    logits, targets = logits_of(8, 64)
    call = jax.jit(differentiate, donate_argnums=0).lower(logits, targets, np.ones(8, bool)).compile()
    assert call.memory_analysis().alias_size_in_bytes == logits.nbytes
    assert "copy(" not in call.as_text()
