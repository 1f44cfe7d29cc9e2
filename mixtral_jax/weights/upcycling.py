"""Sparse upcycling: what a dense model lacks to be a mixture.

Every expert is a copy of the dense feed-forward layer, and the weights of the chosen experts sum to 1, so without noise
the mixture computes exactly what the dense model did, whatever its new routers choose. Source: arXiv 2212.05055.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped
from numpy import ndarray

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.routing import router_init_std
from mixtral_jax.precision import FULL
from mixtral_jax.weights.released import Upcycling

NOISY = ("layers/moe/w_gate", "layers/moe/w_up", "layers/moe/w_down")


def draw_router(
    shape: tuple[int, ...], config: ModelConfig, upcycling: Upcycling
) -> Float[Array, "layers d_model experts"]:
    """Draws the routers of all layers."""
    return router_init_std(config) * jax.random.normal(_keys(upcycling)[0], shape, FULL)


def add_noise(
    matrix: Shaped[ndarray, "rows columns"], path: str, layer: int, expert: int, upcycling: Upcycling
) -> Float[Array, "rows columns"]:
    """Adds normal noise of a share of the matrix's standard deviation, to every expert of every layer its own."""
    key = jax.random.fold_in(jax.random.fold_in(_keys(upcycling)[1 + NOISY.index(path)], layer), expert)
    return _noisy(matrix, key, upcycling.noise)


def _keys(upcycling: Upcycling) -> Array:
    return jax.random.split(jax.random.key(upcycling.seed), 1 + len(NOISY))


@jax.jit
def _noisy(
    matrix: Float[Array, "rows columns"], key: Array, noise: Float[Array, ""] | float
) -> Float[Array, "rows columns"]:
    wide = matrix.astype(FULL)
    return (wide + noise * jnp.std(wide) * jax.random.normal(key, wide.shape, FULL)).astype(matrix.dtype)
