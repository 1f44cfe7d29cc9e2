"""Sparse upcycling: what a dense model lacks to be a mixture.

Every expert is a copy of the dense feed-forward layer, and the weights of the chosen experts sum to 1, so without noise
the mixture computes exactly what the dense model did, whatever its new routers choose. Source: arXiv 2212.05055.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.model.routing import router_init_std
from mixtral_jax.precision import FULL
from mixtral_jax.weights.released import Upcycling


def finish_upcycling(arrays: Arrays, config: ModelConfig, upcycling: Upcycling) -> Arrays:
    """Draws the routers, and adds noise to the copied experts.

    Args:
        arrays: with every expert a copy; consumed.
        config: of the mixture.
        upcycling: noise and seed.
    """
    moe = arrays["params"]["layers"]["moe"]
    router_key, *keys = jax.random.split(jax.random.key(upcycling.seed), 4)
    router = moe["router"]
    draw = jax.jit(
        lambda key: (router_init_std(config) * jax.random.normal(key, router.shape, FULL)).astype(router.dtype),
        out_shardings=router.sharding,
    )
    moe["router"] = draw(router_key)
    if upcycling.noise:
        for name, key in zip(("w_gate", "w_up", "w_down"), keys, strict=True):
            weights = moe.pop(name)
            add = jax.jit(_add_noise, donate_argnums=0, out_shardings=weights.sharding)
            moe[name] = add(weights, key, upcycling.noise)
    return arrays


def _add_noise(
    weights: Float[Array, "layers experts rows columns"], key: Array, noise: Float[Array, ""] | float
) -> Float[Array, "layers experts rows columns"]:
    """Adds normal noise of `noise` times each matrix's standard deviation, a layer at a time to save memory."""

    def one(layer: Array, key: Array) -> Array:
        wide = layer.astype(FULL)
        spread = jnp.std(wide, axis=(1, 2), keepdims=True)
        return (wide + noise * spread * jax.random.normal(key, wide.shape, FULL)).astype(layer.dtype)

    return jax.lax.map(lambda pair: one(*pair), (weights, jax.random.split(key, weights.shape[0])))
