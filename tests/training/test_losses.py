"""The router's losses against formulas written out and numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.data.batch import Batch
from mixtral_jax.model.moe import RouterOutput
from mixtral_jax.training.losses import count, expert_load, load_balance_loss, router_sums
from mixtral_jax.training.step import router_metrics


def routed(logits, k, segment_ids=None):
    """Batch, counts and sums of routers with these logits [layers, batch, seq, experts]."""
    logits = jnp.asarray(logits, jnp.float32)
    indices = jax.lax.top_k(logits, k)[1]
    ids = jnp.ones(logits.shape[1:3], jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    batch = Batch(ids, ids, ids, ids, ids > 0)
    return count(batch), router_sums(RouterOutput(logits, indices, jnp.zeros(logits.shape[0])), batch)


def balance(logits, k, segment_ids=None) -> float:
    counts, sums = routed(logits, k, segment_ids)
    return float(load_balance_loss(expert_load(sums.assignments), sums.probs, counts.tokens))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (8, 2), (8, 3)])
def test_load_balance_is_one_when_all_experts_share(layers, experts, k):
    """Token t prefers experts t, t + 1, ..., t + k - 1: every expert is chosen as often and as likely."""
    row = np.zeros(experts)
    row[:k] = 5 - np.arange(k)
    logits = np.stack([np.roll(row, t) for t in range(experts)])
    assert balance(np.broadcast_to(logits, (layers, 2, experts, experts)), k) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("experts", [4, 8])
def test_load_balance_is_the_number_of_experts_when_one_takes_all(layers, experts):
    logits = np.zeros((layers, 2, 5, experts))
    logits[..., 1] = 50
    assert balance(logits, 1) == pytest.approx(experts, rel=1e-6)


def test_opposite_imbalances_of_two_layers_do_not_cancel():
    logits = np.zeros((2, 1, 6, 2))
    logits[0, ..., 0] = logits[1, ..., 1] = 50
    assert balance(logits, 1) == pytest.approx(2, rel=1e-6)


HAND = np.log([[[[0.5, 0.25, 0.25], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]]]])


def test_a_small_example_by_hand():
    # Choices of top-2: (0, 1), (0, 1), (2, 1), (1, 2); the tie of the first token goes to the lower number.
    f = np.array([2, 4, 2]) / 8
    p = np.array([1.4, 1.25, 1.35]) / 4
    assert balance(HAND, 2) == pytest.approx(3 * np.sum(f * p), rel=1e-6)


def test_padding_counts_neither_in_load_nor_in_probability():
    ids = [[1, 1, 2, 0]]
    f, p = np.array([2, 3, 1]) / 6, np.array([1.2, 0.75, 1.05]) / 3
    assert balance(HAND, 2, ids) == pytest.approx(3 * np.sum(f * p), rel=1e-6)
    counts, sums = routed(HAND, 2, ids)
    kept_counts, kept = routed(HAND[:, :, :3], 2)
    assert counts.tokens == kept_counts.tokens == 3
    for one, other in zip(jax.tree.leaves(sums), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_hugging_face_times_k_on_one_layer():
    """Their loss: E * sum over experts and choices of the share of *tokens* times the mean probability."""
    experts, k = 8, 2
    logits = np.random.default_rng(0).standard_normal((1, 3, 7, experts))
    probs = np.exp(logits[0]) / np.exp(logits[0]).sum(axis=-1, keepdims=True)
    probs = probs.reshape(-1, experts)
    chosen = np.argsort(-probs, axis=-1)[:, :k]
    one_hot = np.eye(experts)[chosen]  # [tokens, k, experts]
    hugging_face = experts * np.sum(one_hot.mean(axis=0) * probs.mean(axis=0))
    assert hugging_face == pytest.approx(k * balance(logits, k), rel=1e-5)


def test_the_gradient_flows_through_the_probabilities_alone():
    counts, sums = routed(HAND, 2)
    load = expert_load(sums.assignments)
    d_load, d_probs = jax.grad(load_balance_loss, (0, 1))(load, sums.probs, counts.tokens)
    assert not np.any(d_load)
    np.testing.assert_allclose(d_probs, 3 * load / 4, rtol=1e-6)


def test_router_z_and_entropy_are_means_over_tokens():
    logits = np.random.default_rng(1).standard_normal((2, 1, 4, 3))
    counts, sums = routed(logits, 1, [[1, 1, 1, 0]])
    kept = logits[:, 0, :3]
    probs = np.exp(kept) / np.exp(kept).sum(axis=-1, keepdims=True)
    expected_z = np.square(np.log(np.exp(kept).sum(axis=-1))).mean(axis=-1)
    np.testing.assert_allclose(sums.logsumexp_squared / counts.tokens, expected_z, rtol=1e-5)
    expected_entropy = -(probs * np.log(probs)).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(sums.entropy / counts.tokens, expected_entropy, rtol=1e-5)


def test_metrics_of_a_small_example():
    counts, sums = routed(HAND, 1)  # choices 0, 0, 2, 1
    metrics = router_metrics(sums, counts, expert_load(sums.assignments))
    np.testing.assert_allclose(metrics["expert_load"], [[0.5, 0.25, 0.25]])
    assert metrics["max_violation"] == pytest.approx(0.5)  # half of the load on one of three experts
    assert metrics["dead_experts"] == 0
    logits = np.zeros((2, 1, 4, 3))
    logits[0, ..., 0] = 1
    counts, sums = routed(logits, 2)  # experts 0 and 1 everywhere
    assert router_metrics(sums, counts, expert_load(sums.assignments))["dead_experts"] == 2


def test_a_batch_of_padding_gives_zeros():
    counts, sums = routed(HAND, 2, [[0, 0, 0, 0]])
    assert load_balance_loss(expert_load(sums.assignments), sums.probs, counts.tokens) == 0
    metrics = router_metrics(sums, counts, expert_load(sums.assignments))
    assert all(np.isfinite(value).all() for value in metrics.values())
