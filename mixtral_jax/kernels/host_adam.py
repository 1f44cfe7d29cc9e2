"""AdamW in place and in one pass, by a function of this process: XLA for CPU passes 11 times over memory where 7 do."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mixtral_jax.kernels.amx import units
from mixtral_jax.kernels.foreign import Buffer, register
from mixtral_jax.precision import FULL


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
    register("host_adam", _update)


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


def _update(params: Buffer, grads: Buffer, mean: Buffer, square: Buffer, packed: Buffer, *_: Buffer) -> None:
    from mixtral_jax.kernels.host_adam_loop import update_blocks

    wanted, *numbers = packed.array(np.float32)
    if wanted:
        found = units()
        assert found is not None
        counter = np.zeros(1, np.int64)
        arrays = (x.array(np.float32).reshape(-1) for x in (params, grads, mean, square))
        found.run(update_blocks, *arrays, np.array(numbers, np.float32), counter.ctypes.data)
