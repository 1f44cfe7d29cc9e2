"""Figures of a batch in float64 and plain NumPy, from what the model gives: activations and router logits."""

from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax

from mixtral_jax.data.batch import Batch
from mixtral_jax.model.mixtral import Architecture

LOSSES = ("cross_entropy", "load_balance_loss", "router_z_loss")


def figures_by_hand(architecture: Architecture, arrays: Any, batch: Batch) -> dict[str, Any]:
    """What a step logs of a whole batch: the losses without coefficients, and how the routers dealt its tokens."""
    model = architecture.bind(arrays)
    x, router = model(batch.tokens, batch.segment_ids, batch.positions)
    log_probs = log_softmax(np.float64(x) @ np.float64(model.head()), axis=-1)
    mask, valid = np.asarray(batch.loss_mask), np.asarray(batch.segment_ids) > 0
    nats = -np.take_along_axis(log_probs, np.asarray(batch.targets)[..., None], -1)[..., 0]
    loads, balance, z, entropy = [], [], [], []
    for layer in np.float64(router.router_logits):
        logits = layer[valid]
        experts, k = logits.shape[-1], architecture.config.num_experts_per_tok
        chosen = np.argsort(-logits, axis=-1)[:, :k]
        probs = softmax(logits, axis=-1)
        loads.append(np.bincount(chosen.ravel(), minlength=experts) / chosen.size)
        balance.append(experts * np.sum(loads[-1] * probs.mean(axis=0)))
        z.append(np.mean(logsumexp(logits, axis=-1) ** 2))
        entropy.append(-np.sum(probs * np.log(probs), axis=-1).mean())
    assert len(balance) > 1, "several layers"
    return {
        "cross_entropy": nats[mask].sum() / mask.sum(),
        "load_balance_loss": np.mean(balance),
        "router_z_loss": np.mean(z),
        "router_entropy": np.mean(entropy),
        "max_violation": np.max(loads) * len(loads[0]) - 1,
        "dead_experts": np.sum(np.equal(loads, 0)),
        "expert_load": np.array(loads),
    }
