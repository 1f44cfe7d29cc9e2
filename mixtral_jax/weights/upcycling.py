"""Sparse upcycling: what a dense model lacks to be a mixture.

Every expert is a copy of the dense feed-forward layer, and the weights of the chosen experts sum to 1, so without noise
the mixture computes exactly what the dense model did, whatever its new routers choose. Source: arXiv 2212.05055.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped
from numpy import ndarray

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.model.mixtral import Architecture, Arrays
from mixtral_jax.model.routing import router_init_std
from mixtral_jax.precision import FULL
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runs.restoring import ADAPTERS
from mixtral_jax.weights.released import Upcycling

NOISY = ("layers/moe/w_gate", "layers/moe/w_up", "layers/moe/w_down")
# Where the axis of the experts is, in the arrays of all layers that have one.
EXPERTS = {"router": 2, "w_gate": 1, "w_up": 1, "w_down": 1, "selection_bias": 1}


def restore_as_mixture(checkpoints: Checkpoints, step: int, architecture: Architecture, seed: int) -> Arrays:
    """Restores a model of one expert, which is a dense one, as a mixture of copies of it.

    Args:
        checkpoints: of a run whose `model.num_experts` is 1.
        step: of the checkpoint, which has been found good.
        architecture: of the mixture.
        seed: of the routers.

    Raises:
        UserError: arrays do not fit, or there are adapters.
    """
    if ADAPTERS in checkpoints.read_meta(step):
        raise UserError(
            f"{checkpoints.directory / str(step)} holds adapters, of which no mixture is made: add them to their base "
            "first, export --format checkpoint"
        )
    abstract = architecture.abstract()
    dense = checkpoints.restore(step, jax.tree_util.tree_map_with_path(_alone, abstract))

    def create(dense: Arrays) -> Arrays:
        def copied(path: Any, array: Array, wanted: jax.ShapeDtypeStruct) -> Array:
            if path[-1].key == "router":
                return draw_router(wanted.shape, architecture.config, seed).astype(wanted.dtype)
            return jnp.broadcast_to(array, wanted.shape)  # the bias of a dense model has never moved from zero

        return jax.tree_util.tree_map_with_path(copied, dense, abstract)

    return jax.jit(create, out_shardings=architecture.shardings())(dense)


def _alone(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same array of a model with one expert, which every device of a group of experts has whole."""
    axis = EXPERTS.get(path[-1].key)
    if axis is None:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding)
    shape, spec = list(leaf.shape), [*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
    shape[axis], spec[axis] = 1, None
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec)))


def draw_router(shape: tuple[int, ...], config: ModelConfig, seed: int) -> Float[Array, "layers d_model experts"]:
    """Draws the routers of all layers."""
    return router_init_std(config) * jax.random.normal(_keys(seed)[0], shape, FULL)


def add_noise(
    matrix: Shaped[ndarray, "rows columns"], path: str, layer: int, expert: int, upcycling: Upcycling
) -> Float[Array, "rows columns"]:
    """Adds normal noise of a share of the matrix's standard deviation, to every expert of every layer its own."""
    key = jax.random.fold_in(jax.random.fold_in(_keys(upcycling.seed)[1 + NOISY.index(path)], layer), expert)
    return _noisy(matrix, key, upcycling.noise)


def _keys(seed: int) -> Array:
    return jax.random.split(jax.random.key(seed), 1 + len(NOISY))


@jax.jit
def _noisy(
    matrix: Float[Array, "rows columns"], key: Array, noise: Float[Array, ""] | float
) -> Float[Array, "rows columns"]:
    wide = matrix.astype(FULL)
    return (wide + noise * jnp.std(wide) * jax.random.normal(key, wide.shape, FULL)).astype(matrix.dtype)
