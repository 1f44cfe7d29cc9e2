"""AdamW in place and in one pass, by a function of this process: XLA for CPU passes 11 times over memory where 7 do."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixtral_jax.precision import FULL

SUMMED = 1 << 14  # elements whose squares are summed in one order


class Numbers(NamedTuple):
    """What the update of an array takes beside it."""

    learning_rate: float | Array
    clip: float | Array  # factor of the gradient
    of_mean: float | Array  # 1 / (1 - beta1^t), the correction of the first moment
    of_square: float | Array
    beta1: float
    beta2: float
    rest1: float  # 1 - beta1
    rest2: float
    eps: float
    decay: float


@functools.cache
def _register() -> None:
    from mixtral_jax.kernels.cpu import adamw_calls, intrinsics, xla_ffi

    intrinsics.know(intrinsics.UPDATE, adamw_calls.update_task)
    intrinsics.know(intrinsics.SUM_SQUARES, adamw_calls.sum_task)
    xla_ffi.register("host_adam", adamw_calls.update)
    xla_ffi.register("host_sum_squares", adamw_calls.sum_squares)


def update_in_place(
    params: Array, grads: Array, mean: Array, square: Array, numbers: Numbers, wanted: Array
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Computes parameters and moments after a step, or leaves them as they are where it is not wanted.

    Source: arXiv 1711.05101.
    """
    _register()
    packed = jnp.stack([jnp.asarray(x, FULL) for x in (wanted, *numbers)])
    results = [jax.ShapeDtypeStruct(x.shape, FULL) for x in (params, mean, square)]
    call = jax.ffi.ffi_call("host_adam", results, input_output_aliases={0: 0, 2: 1, 3: 2})
    new_params, new_mean, new_square = call(params, grads, mean, square, packed)
    return new_params, new_mean, new_square


def global_norm(arrays: Sequence[Array]) -> Float[Array, ""]:
    """Computes the root of the sum of the squares of all elements."""
    _register()
    blocks = sum(-(-x.size // SUMMED) for x in arrays)
    return jnp.sqrt(jnp.sum(jax.ffi.ffi_call("host_sum_squares", jax.ShapeDtypeStruct((blocks,), FULL))(*arrays)))
