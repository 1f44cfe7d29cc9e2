"""Routes that are known beforehand, and what is counted of them."""

import numpy as np

from mixtral_jax.evaluation.routing import RoutingCounts
from mixtral_jax.evaluation.scoring import Routes
from mixtral_jax.evaluation.windows import batch_of as batch_of_windows
from tests.tiny import tiny_config


def model_of(layers: int, k: int, experts: int):
    sizes = {"num_layers": layers, "num_experts": experts, "num_experts_per_tok": k}
    return tiny_config(model=sizes).model


def batch_of(tokens, segment_ids=None):
    """Rows of tokens, each one document if not said else."""
    batch = batch_of_windows([], *np.shape(tokens))
    batch.tokens[:] = tokens
    batch.segment_ids[:] = 1 if segment_ids is None else segment_ids
    return batch


def counted(experts, tokens=None, segment_ids=None, num_experts=8):
    """Counts one batch of planted choices [rows, context, layers, k]; tokens are all the same if not said else."""
    counts = RoutingCounts(model_of(*experts.shape[2:], num_experts))
    tokens = np.zeros(experts.shape[:2], int) if tokens is None else tokens
    counts.count(Routes(experts, np.zeros(experts.shape[:3])), batch_of(tokens, segment_ids))
    return counts
