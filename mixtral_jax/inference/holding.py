"""A model's weights in less memory, for writing text: the matrices rounded, norms and routers as they were."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mixtral_jax.kernels.stored import EightBitWeights
from mixtral_jax.model.mixtral import Arrays

# Matrices of a layer, and the axes that their products sum over; the first axis is the layer's number.
SUMMED = {"wq": (1,), "wk": (1,), "wv": (1,), "wo": (1, 2), "w_gate": (2,), "w_up": (2,), "w_down": (2,)}
OTHERS = ("embedding", "lm_head")


def hold_weights(arrays: Arrays, kind: str) -> Arrays:
    """Rounds matrices one after the other, and gives the memory of each back.

    Args:
        arrays: of the model; those that are rounded are gone afterwards.
        kind: a float type, for all matrices; or int8, for those of layers, with a scale for each output channel.

    Returns:
        The same tree, in which `EightBitWeights` stand for matrices of int8.
    """

    def hold(path: jax.tree_util.KeyPath, leaf: Array) -> Array | EightBitWeights:
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ""
        if name not in (SUMMED if kind == "int8" else (*SUMMED, *OTHERS)) or leaf.dtype == kind:
            return leaf
        if kind == "int8":
            held = jax.jit(EightBitWeights.quantize, static_argnums=1)(leaf, SUMMED[name])
        else:
            held = jnp.astype(leaf, kind)
        jax.block_until_ready(held)
        leaf.delete()
        return held

    return jax.tree_util.tree_map_with_path(hold, arrays)  # type: ignore[no-any-return]


def size_of(arrays: Arrays) -> int:
    """Counts the bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
