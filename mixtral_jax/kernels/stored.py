"""Weights as they are held to write text: of the parameters' type, or int8 with a scale for each output channel."""

from dataclasses import dataclass
from types import EllipsisType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

from mixtral_jax.kernels.backends import load
from mixtral_jax.precision import FULL

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EightBitWeights:
    """What stands for a parameter of a model: numbers times the scales of their output channels."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]  # as many axes; those that a product sums over have length 1

    @classmethod
    def quantize(cls, weights: Float[Array, "..."], summed: tuple[int, ...]) -> "EightBitWeights":
        """Rounds weights; `summed` are the axes that their product sums over."""
        wide = weights.astype(FULL)
        scale = jnp.max(jnp.abs(wide), axis=summed, keepdims=True) / LARGEST
        return cls(jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)

    def astype(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """Returns the weights themselves."""
        return (self.values.astype(FULL) * self.scale).astype(dtype)

    def __getitem__(self, key: EllipsisType) -> "EightBitWeights":
        """Lets `parameter[...]` be what it is for an array."""
        return self


class Matrices(NamedTuple):
    """Matrices of all layers as they are held."""

    values: Float[Array, "layers experts inner outer"] | Int8[Array, "layers experts inner outer"]
    scale: Float[Array, "layers experts 1 outer"] | None = None  # of int8


class StoredExperts(NamedTuple):
    """The experts of all layers as they are held, and which layer is meant; there are no gradients."""

    w_gate: Matrices
    w_up: Matrices
    w_down: Matrices
    layer: Int[Array, ""]


def matrices(weights: Float[Array, "..."] | EightBitWeights, experts: int, inner: int | None = None) -> Matrices:
    """Views weights [layers, (experts,) *inner, *outer] as matrices; `inner` is the product of the inner lengths."""
    if isinstance(weights, EightBitWeights):
        values, scale = weights.values, weights.scale
    else:
        values, scale = weights, None
    inner = inner or values.shape[2]
    values = values.reshape(values.shape[0], experts, inner, -1)
    return Matrices(values, None if scale is None else scale.reshape(values.shape[0], experts, 1, -1))


def multiply_stored(
    x: Float[Array, "rows inner"], layer: Int[Array, ""] | int, *stacks: Matrices
) -> list[Float[Array, "rows outer"]]:
    """Multiplies rows with one layer of each stack of matrices, in the type of the rows."""
    sizes, layer = jnp.array([len(x)], jnp.int32), jnp.asarray(layer, jnp.int32)
    engine = load("decoding", "stored")
    return [out.astype(x.dtype) for out in engine.multiply_stored(x.astype(FULL), sizes, layer, stacks)]
