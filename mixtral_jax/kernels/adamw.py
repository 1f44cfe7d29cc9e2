"""AdamW, array by array, and the norm of gradients; see `backends` for who computes them. Source: arXiv 1711.05101."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mixtral_jax.kernels.backends import load
from mixtral_jax.precision import FULL


class AdamW(NamedTuple):
    """What the update of an array takes beside it."""

    learning_rate: float | Float[Array, ""]
    clip: float | Float[Array, ""]  # factor of the gradient
    mean_correction: float | Float[Array, ""]  # 1 / (1 - beta1^t)
    square_correction: float | Float[Array, ""]  # 1 / (1 - beta2^t)
    beta1: float
    beta2: float
    one_minus_beta1: float  # rounded once
    one_minus_beta2: float
    eps: float
    weight_decay: float


class Moments(NamedTuple):
    """An array of parameters and what Adam knows of it."""

    params: Float[Array, "..."]
    mean: Float[Array, "..."]
    square: Float[Array, "..."]


def update(
    old: Moments, grads: Float[Array, "..."], factors: AdamW, finite: Bool[Array, ""], *, backend: str
) -> Moments:
    """Computes parameters and moments after a step; all as they are where the step is not finite.

    Args:
        old: before the step.
        grads: in float32.
        factors: of this step.
        finite: whether the gradients are.
        backend: of `adamw`.
    """
    if backend != "xla":
        return Moments(*load("adamw", backend).update_in_place(*old, grads, factors, finite))
    grads = grads * factors.clip
    mean = factors.beta1 * old.mean.astype(FULL) + factors.one_minus_beta1 * grads
    square = factors.beta2 * old.square + factors.one_minus_beta2 * jnp.square(grads)
    adam = mean * factors.mean_correction / (jnp.sqrt(square * factors.square_correction) + factors.eps)
    params = old.params.astype(FULL)
    params = params - factors.learning_rate * (adam + factors.weight_decay * params)
    new = Moments(params, mean, square)
    return Moments(*(jnp.where(finite, x.astype(y.dtype), y) for x, y in zip(new, old, strict=True)))


def global_norm(arrays: Sequence[Float[Array, "..."]], *, backend: str) -> Float[Array, ""]:
    """Computes the root of the sum of the squares of all elements, in float32."""
    if backend != "xla":
        norm: Array = load("adamw", backend).global_norm(arrays)
        return norm
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(FULL))) for x in arrays))
