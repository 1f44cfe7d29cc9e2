"""THE table of float types: no other module of the package names one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixtral_jax.config import PrecisionConfig


@dataclass(frozen=True)
class Precision:
    """Float type of every quantity that has a choice, and of those that have none."""

    params: DTypeLike
    compute: DTypeLike  # matrix products and activations
    gradients: DTypeLike  # accumulation over microbatches
    optimizer: DTypeLike  # first moment; the second is `full`
    experts: DTypeLike | None = None  # 8-bit factors of the experts' products; None: `compute`
    full: DTypeLike = jnp.float32  # router, softmax, norm statistics, logits, losses


def make_precision(config: PrecisionConfig) -> Precision:
    """Turns the names of the configuration into float types."""
    names = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    eight_bit = {"compute": None, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
    return Precision(
        params=names[config.params],
        compute=names[config.compute],
        gradients=names[config.gradients],
        optimizer=names[config.optimizer],
        experts=eight_bit[config.experts],
    )


FULL: DTypeLike = jnp.float32  # accumulators inside kernels
EIGHT_BIT_CARRIER: DTypeLike = jnp.bfloat16  # holds every number of 8 bits, where there is no product of these
# Accelerators round the factors of a float32 product to fewer bits (TF32, bfloat16) unless the product says otherwise.
EXACT_PRODUCT = jax.lax.Precision.HIGHEST
