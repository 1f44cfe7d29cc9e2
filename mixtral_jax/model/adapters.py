"""Low-rank adapters: a layer's matrix is W + scale * A B, of which A and B are trained and W stays.

The sum is made layer by layer inside the decoder's loop and made again for the backward pass. So every kernel and mesh
computes with it as with any matrix, and of all layers' matrices and their gradients only one layer's exist at once.

Source: arXiv 2106.09685.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mixtral_jax.config import ObjectiveConfig
from mixtral_jax.precision import EXACT_PRODUCT, FULL

# Parameters of a layer: how A and B, in this order, multiply to the matrix. `r` is the rank, `e` the experts; the rest
# of A's axes are those of the matrix's input, the rest of B's those of its output.
PRODUCTS = {
    "attention/wq": "dr,rhk->dhk",
    "attention/wk": "dr,rhk->dhk",
    "attention/wv": "dr,rhk->dhk",
    "attention/wo": "hkr,rd->hkd",
    "moe/w_gate": "edr,erf->edf",
    "moe/w_up": "edr,erf->edf",
    "moe/w_down": "efr,erd->efd",
    "moe/router": "dr,re->de",
}

Adapters = dict[str, dict[str, Array]]  # path -> {"a": A, "b": B}, each with a leading axis `layers`


def at(layers: Any, path: str) -> Any:
    """Looks up a parameter of the layers, or what a tree like theirs says of it."""
    module, name = path.split("/")
    return layers[module][name]


def factors(objective: ObjectiveConfig, layers: Any, of: Callable[[Any], tuple[Any, ...]], rank: Any) -> Any:
    """Derives what there is to say of the axes of each adapter's A and B: sizes, or logical axes.

    Args:
        objective: says which parameters are adapted.
        layers: tree of the layers' parameters, or like it.
        of: what an entry of the tree says of each axis, of which the first is `layers`.
        rank: what is to be said of the axis of the rank.
    """
    found = {}
    for path in PRODUCTS if objective.lora_router else [path for path in PRODUCTS if path != "moe/router"]:
        left, right, product = re.split(",|->", PRODUCTS[path])
        known = {**dict(zip("l" + product, of(at(layers, path)), strict=True)), "r": rank}
        found[path] = {name: tuple(known[x] for x in "l" + letters) for name, letters in (("a", left), ("b", right))}
    return found


def initial(draw: np.random.Generator, abstract: dict[str, Any], path: str) -> dict[str, Float[np.ndarray, "..."]]:
    """Draws A with a variance of 1 / inputs and makes B zero: at first the adapter changes nothing."""
    shape = abstract["a"].shape
    inputs = math.prod(size for size, letter in zip(shape, "l" + PRODUCTS[path], strict=False) if letter not in "ler")
    a = draw.standard_normal(shape, np.float32) * np.float32(inputs**-0.5)
    return {"a": a, "b": np.zeros(abstract["b"].shape, np.float32)}


def add(
    weight: Float[Array, "..."], factors: dict[str, Float[Array, "..."]], path: str, scale: float
) -> Float[Array, "..."]:
    """Computes W + scale * A B of one layer, in float32 whatever the type of W is."""
    product = jnp.einsum(PRODUCTS[path], factors["a"], factors["b"], precision=EXACT_PRODUCT)
    return weight.astype(FULL) + scale * product
