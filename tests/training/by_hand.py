"""The losses of a batch in float64 and plain NumPy, from what the model gives: activations and router logits."""

from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax

from mixtral_jax.data.batch import Batch
from mixtral_jax.model.mixtral import Architecture


def losses_by_hand(architecture: Architecture, arrays: Any, batch: Batch) -> dict[str, float]:
    """Cross-entropy, load balance and router z of a whole batch; no coefficients."""
    model = architecture.bind(arrays)
    x, router = model(batch.tokens, batch.segment_ids, batch.positions)
    log_probs = log_softmax(np.float64(x) @ np.float64(model.head()), axis=-1)
    mask, valid = np.asarray(batch.loss_mask), np.asarray(batch.segment_ids) > 0
    assert 0 < mask.sum() < valid.sum() < valid.size, "the batch has padding and tokens that are not to be predicted"
    nats = -np.take_along_axis(log_probs, np.asarray(batch.targets)[..., None], -1)[..., 0]
    balance, z = [], []
    for layer in np.float64(router.router_logits):
        logits = layer[valid]
        experts, k = logits.shape[-1], architecture.config.num_experts_per_tok
        chosen = np.argsort(-logits, axis=-1)[:, :k]
        load = np.bincount(chosen.ravel(), minlength=experts) / chosen.size
        balance.append(experts * np.sum(load * softmax(logits, axis=-1).mean(axis=0)))
        z.append(np.mean(logsumexp(logits, axis=-1) ** 2))
    assert len(balance) > 1, "several layers"
    return {
        "cross_entropy": nats[mask].sum() / mask.sum(),
        "load_balance_loss": np.mean(balance),
        "router_z_loss": np.mean(z),
    }
