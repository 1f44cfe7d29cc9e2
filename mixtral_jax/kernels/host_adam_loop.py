"""One pass of AdamW over memory, compiled by Numba."""

import math
from typing import no_type_check

import numpy as np

from mixtral_jax.kernels.amx_units import compiled, take_next

BLOCK = 1 << 16  # elements that a thread takes at a time


@compiled
@no_type_check
def update_blocks(
    params: np.ndarray,
    grads: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    numbers: np.ndarray,
    counter: int,
    configurations: int,
    workspace: int,
) -> None:
    """Updates blocks of parameters and moments in place, as long as the threads that share a counter find one left.

    Args:
        params, grads, mean, square: float32 [elements].
        numbers: see `host_adam.Numbers`.
        counter: address of an int64 that begins at zero.
        configurations, workspace: of `amx.Units`; not used.
    """
    rate, clip, of_mean, of_square, beta1, beta2, rest1, rest2, eps, decay = numbers
    while True:
        start = take_next(counter) * BLOCK
        if start >= params.size:
            break
        place = slice(start, start + BLOCK)
        p, g, m, v = params[place], grads[place], mean[place], square[place]
        for i in range(p.size):  # over slices, whose indices Numba knows not to be negative: else no vectors
            grad = g[i] * clip
            first = beta1 * m[i] + rest1 * grad
            second = beta2 * v[i] + rest2 * grad * grad
            m[i], v[i] = first, second
            p[i] -= rate * (first * of_mean / (math.sqrt(second * of_square) + eps) + decay * p[i])
