"""One draw against a slow one, written out token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.inference.sampling import Sampling, choose_tokens, stack

VOCAB = 12
DRAWS = 4000


def allowed(logits, seen, sampling):
    """The tokens that may be drawn, and their probabilities."""
    scores = {}
    for token, logit in enumerate(logits):
        if seen[token]:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        scores[token] = logit / sampling.temperature
    falling = sorted(scores, key=lambda token: -scores[token])[: sampling.top_k or None]
    weight = {token: np.exp(scores[token] - scores[falling[0]]) for token in falling}
    kept, reached = [], 0.0
    for token in falling:
        if reached < sampling.top_p:
            kept.append(token)
        reached += weight[token] / sum(weight.values())
    kept = [token for token in kept if weight[token] >= sampling.min_p]
    total = sum(weight[token] for token in kept)
    return {token: weight[token] / total for token in kept}


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.7, "temperature": 1.7},
        {"top_p": 1e-6},
    ],
)
def test_draws_follow_the_distribution_of_what_is_allowed(wish):
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=VOCAB).astype(np.float32), rng.random(VOCAB) < 0.4
    sampling = Sampling(**{"temperature": 0.8, **wish})
    tokens, log_probs = choose_tokens(
        jnp.tile(logits, (DRAWS, 1)), jnp.tile(seen, (DRAWS, 1)), jnp.arange(DRAWS), stack([sampling] * DRAWS)
    )
    expected = allowed(logits, seen, sampling)
    assert set(np.asarray(tokens).tolist()) <= expected.keys()
    counts = np.bincount(tokens, minlength=VOCAB) / DRAWS
    spread = [4.5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-9 for p in expected.values()]
    assert all(abs(counts[t] - p) <= s for (t, p), s in zip(expected.items(), spread, strict=True))
    own = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(log_probs, own[np.asarray(tokens)], atol=1e-5)


def test_greedy_heeds_the_penalty_alone():
    logits, seen = jnp.array([[2.0, 1.9, -1.0]]), jnp.array([[True, False, False]])
    wishes = [Sampling(), Sampling(repetition_penalty=1.2), Sampling(top_k=1, min_p=1.0)]
    assert [int(choose_tokens(logits, seen, jnp.zeros(1, int), stack([wish]))[0][0]) for wish in wishes] == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", 1e300), ("temperature", 1e-40),
     ("top_k", -1), ("top_k", 1 << 31), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0.0),
     ("repetition_penalty", 1e30), ("seed", -1), ("seed", 1 << 32)],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=f"^{name} is "):
        Sampling(**{name: value})
