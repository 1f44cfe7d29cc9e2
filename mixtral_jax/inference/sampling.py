"""The next token of every text, drawn from its logits as each text asks."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from mixtral_jax.config import UserError
from mixtral_jax.precision import FULL


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one text are drawn; the defaults take the likeliest token, always."""

    temperature: float = 0.0  # divides the logits; 0: the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # then only the likeliest tokens that together reach this probability
    min_p: float = 0.0  # then only tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens that the text has, multiplies negative ones
    seed: int = 0  # of the draws, which nothing but the seed, the place in the text and the logits decide

    def __post_init__(self) -> None:
        """Raises `UserError` for a value out of range."""
        warm = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6  # beyond, float32 has no logits
        for name, fits, range_ in (
            ("temperature", warm, "0 or from 1e-6 to 1e6"),
            ("top_k", 0 <= self.top_k < 1 << 31, "from 0 (all) to 2^31 - 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000"),
            ("seed", 0 <= self.seed < 1 << 32, "from 0 to 2^32 - 1"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}: it must be {range_}")


class SamplingArrays(NamedTuple):
    """`Sampling` of every text, so that one program serves them all."""

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    seed: UInt32[Array, " batch"]


TYPES = (FULL, jnp.int32, FULL, FULL, FULL, jnp.uint32)


def stack(samplings: Sequence[Sampling]) -> SamplingArrays:
    """Puts the wishes of several texts into arrays."""
    columns = zip(*map(astuple, samplings), strict=True)
    return SamplingArrays(*(jnp.asarray(np.array(c), dtype) for c, dtype in zip(columns, TYPES, strict=True)))


def choose_tokens(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    positions: Int[Array, " batch"],
    sampling: SamplingArrays,
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """Draws one token a text.

    Args:
        logits: float32.
        seen: tokens that each text has, its prompt included.
        positions: place of the new token in its text.
        sampling: see `Sampling`.

    Returns:
        Token ids, and the log-probability of each under the model itself, in nats.

    Source: arXiv 1909.05858 (repetition penalty), 1904.09751 (top-p), 2407.01082 (min-p).
    """
    penalty = sampling.repetition_penalty[:, None]
    penalized = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    warm = penalized / jnp.maximum(sampling.temperature, jnp.finfo(FULL).tiny)[:, None]
    filters = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    allowed = jax.lax.cond(jnp.any(filters), _filtered, lambda warm, _: warm, warm, sampling)
    # Not by `argmax`, which XLA for CPU computes number by number: a fifteenth of a step of 32 texts.
    peak = penalized >= jnp.max(penalized, axis=-1, keepdims=True)
    likeliest = jnp.min(jnp.where(peak, jnp.arange(peak.shape[-1]), peak.shape[-1] - 1), axis=-1)
    warm_ones = sampling.temperature > 0
    drawn = jax.lax.cond(jnp.any(warm_ones), _drawn, lambda *_: likeliest, allowed, sampling.seed, positions)
    tokens = jnp.where(warm_ones, drawn, likeliest).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]


def _drawn(allowed: Array, seeds: Array, positions: Array) -> Array:
    keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(seeds, positions)
    return jax.vmap(jax.random.categorical)(keys, allowed)


def _filtered(warm: Array, sampling: SamplingArrays) -> Array:
    """Takes tokens that a text does not allow out of its logits; the likeliest one always stays."""
    vocab = warm.shape[-1]
    falling = -jnp.sort(-warm, axis=-1)
    among_k = jnp.arange(vocab) < jnp.where(sampling.top_k > 0, sampling.top_k, vocab)[:, None]
    probs = jax.nn.softmax(jnp.where(among_k, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    count = jnp.sum(among_k & (before < sampling.top_p[:, None]), axis=-1)
    least = jnp.take_along_axis(falling, jnp.maximum(count, 1)[:, None] - 1, axis=-1)
    least = jnp.maximum(least, falling[:, :1] + jnp.log(sampling.min_p)[:, None])
    return jnp.where(warm >= least, warm, -jnp.inf)
