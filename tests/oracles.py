"""Slow, obvious float64 references. Those that give gradients are written in JAX and run under `float64()`."""

import jax
import jax.numpy as jnp
import numpy as np


def float64():
    """Context in which JAX computes in float64."""
    return jax.enable_x64(True)


def error(actual, expected) -> float:
    """Largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.max(np.abs(actual - expected)) / max(float(np.max(np.abs(expected))), 1e-30))


def swiglu(x, w_gate, w_up, w_down):
    gate = x @ w_gate
    return (gate / (1 + np.exp(-gate)) * (x @ w_up)) @ w_down


def moe_by_token(x, router, w_gate, w_up, w_down, k, valid, capacity=None):
    """The layer token by token in numpy: output, number dropped, which [batch, seq, experts] ran."""
    x, router, w_gate, w_up, w_down = (np.asarray(a, np.float64) for a in (x, router, w_gate, w_up, w_down))
    y, dropped = np.zeros_like(x), 0
    ran = np.zeros((*x.shape[:2], router.shape[1]), bool)
    for row in range(x.shape[0]):
        taken = np.zeros(router.shape[1], int)
        for t in range(x.shape[1]):
            if not valid[row, t]:
                continue
            logits = x[row, t] @ router
            best = np.argsort(-logits, kind="stable")[:k]
            weights = np.exp(logits[best] - logits[best].max())
            for e, weight in zip(best, weights / weights.sum(), strict=True):
                if capacity is not None and taken[e] >= capacity:
                    dropped += 1
                    continue
                taken[e] += 1
                ran[row, t, e] = True
                y[row, t] += weight * swiglu(x[row, t], w_gate[e], w_up[e], w_down[e])
    return y, dropped, ran


def moe_dense(x, router, w_gate, w_up, w_down, k, ran):
    """The same layer by computing every expert for every token; `ran` says which assignments count."""
    logits = x @ router
    kth = jnp.sort(logits, axis=-1)[..., -k, None]
    weights = jax.nn.softmax(jnp.where(logits >= kth, logits, -jnp.inf), axis=-1) * ran
    inner = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, w_gate)) * jnp.einsum("bsd,edf->bsef", x, w_up)
    return jnp.einsum("bsef,efd,bse->bsd", inner, w_down, weights)


def attention(q, k, v, segment_ids):
    """Causal attention inside segments with the whole matrix of scores."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    index = jnp.arange(q.shape[1])
    seen = (index[:, None] >= index) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1), v)


def token_losses(x, head, targets):
    """-log softmax(x head)[target] of every position."""
    logits = x @ head
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def value_and_pull(function, arrays, cotangent):
    """Output of a float64 reference and the gradients of sum(output * cotangent)."""
    with float64():
        arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
        value, pull = jax.vjp(function, *arrays)
        return np.asarray(value), [np.asarray(g) for g in pull(jnp.asarray(np.asarray(cotangent, np.float64)))]
