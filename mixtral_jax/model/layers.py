"""Parameters with logical axes, normalisation and rotary embedding."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.lookup import look_up
from mixtral_jax.model.rope_scaling import attention_factor, rotary_frequencies
from mixtral_jax.precision import FULL, Precision
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import VOCAB_AXIS, Axes, add_up, by_device, gather, spec

Rotary = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]  # cosine and sine of each angle


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: Axes,
    std: float,
    precision: Precision,
) -> nnx.Param:
    """Declares a normally distributed parameter together with its logical axes."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, precision.params), axes=axes)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32. Source: arXiv 1910.07467."""

    def __init__(self, d_model: int, eps: float, precision: Precision):
        axes: Any = (None,)
        self.scale = nnx.Param(jnp.ones((d_model,), precision.params), axes=axes)
        self.eps = eps
        self.precision = precision

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        """Normalises the last axis."""

        @partial(jax.checkpoint, prevent_cse=False)  # three arrays of the size of x would be kept for the backward pass
        def normalize(x: Array, scale: Array) -> Array:
            wide = x.astype(FULL)
            inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
            return (wide * inverse * scale.astype(FULL)).astype(self.precision.compute)

        return normalize(x, self.scale[...])


def embed(
    table: Float[Array, "vocab d_model"], tokens: Int[Array, "batch seq"], runtime: Runtime
) -> Float[Array, "batch seq d_model"]:
    """Looks up token ids, each device in its own rows of the table."""

    def local(table: Array, tokens: Array) -> Array:
        table = gather(table, runtime.mesh, "d_model", axis=1)
        row = tokens - jax.lax.axis_index(VOCAB_AXIS) * table.shape[0]
        # Rows of other devices are out of range; a negative index would count from the end.
        row = jnp.where(row < 0, table.shape[0], row)
        take = look_up if runtime.deterministic else partial(jnp.take, axis=0, mode="fill", fill_value=0)
        return add_up(take(table, row).astype(runtime.precision.compute), runtime.mesh, VOCAB_AXIS)

    return by_device(
        local,
        runtime.mesh,
        (spec(("vocab", "d_model")), spec(("batch", "sequence"))),
        spec(("batch", "sequence", None)),
    )(table.astype(FULL), tokens)  # its gradient is a sum over every use of a word: bfloat16 would stall at 256 of them


def rotary_tables(positions: Int[Array, "batch seq"], config: ModelConfig) -> Rotary:
    """Computes cosine and sine of position * frequency, times YaRN's factor where rope_scaling says so."""
    angles = positions[..., None].astype(FULL) * rotary_frequencies(config)
    factor = attention_factor(config.rope_scaling)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates element i of a head with element i + head_dim / 2, Hugging Face's layout. Source: arXiv 2104.09864."""
    first, second = jnp.split(x.astype(FULL), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
