"""Frequencies of the rotary embedding, and how they are slowed for texts longer than those of the first training."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from mixtral_jax.config import ModelConfig, RopeScalingConfig
from mixtral_jax.precision import FULL


def attention_factor(scaling: RopeScalingConfig) -> float:
    """Returns what cosine and sine are multiplied by; YaRN's own value is 0.1 ln(factor) + 1, arXiv 2309.00071."""
    if scaling.attention_factor is not None or scaling.kind != "yarn":
        return scaling.attention_factor or 1.0
    return 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0


def rotary_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Computes radians per position: theta^(-2i / head_dim), for i below head_dim / 2, slowed as rope_scaling says.

    Linear scaling divides all by the factor. YaRN divides those that turn less than beta_slow times in the original
    context, leaves those that turn more than beta_fast times, and goes linearly between. Source: arXiv 2309.00071.
    """
    scaling, dim, theta = config.rope_scaling, config.head_dim, config.rope_theta
    plain = theta ** (-jnp.arange(0, dim, 2, dtype=FULL) / dim)
    if scaling.kind == "none":
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    turning = lambda turns: dim * math.log(scaling.original_context / (turns * math.tau)) / (2 * math.log(theta))  # noqa: E731
    low = max(math.floor(turning(scaling.beta_fast)), 0)
    high = min(math.ceil(turning(scaling.beta_slow)), dim - 1)
    share = jnp.clip((jnp.arange(dim // 2, dtype=FULL) - low) / (high - low or 1e-3), 0, 1)
    return slow * share + plain * (1 - share)
