"""Softmax of logits and its derivative in one pass over memory, by functions of this process for XLA's programs."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.precision import FULL


class Rows(NamedTuple):
    """What is known of rows of logits."""

    log_total: Float[Array, " rows"]  # logarithm of the sum of all exponentials
    at_target: Float[Array, " rows"]
    peak: Float[Array, " rows"]


@functools.cache
def _register() -> None:
    from mixtral_jax.kernels.cpu import intrinsics, softmax_calls, xla_ffi

    intrinsics.know(intrinsics.SOFTMAX, softmax_calls.softmax_task)
    xla_ffi.register("host_softmax", softmax_calls.softmax)


def summarize(logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"]) -> Rows:
    """Computes what losses need of logits."""
    _register()
    call = jax.ffi.ffi_call("host_softmax", [jax.ShapeDtypeStruct(targets.shape, FULL)] * 3)
    return Rows(*call(logits, targets.astype(np.int32), gradient=np.int64(0)))


def differentiate(
    logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"], mask: Bool[Array, " rows"]
) -> tuple[Rows, Float[Array, "rows vocab"]]:
    """Computes the same and the gradient of the sum of losses of rows within the mask, in the memory of the logits."""
    _register()
    results = [jax.ShapeDtypeStruct(logits.shape, FULL), *[jax.ShapeDtypeStruct(targets.shape, FULL)] * 3]
    call = jax.ffi.ffi_call("host_softmax", results, input_output_aliases={0: 0})
    d_logits, *rows = call(logits, targets.astype(np.int32), mask.astype(np.int32), gradient=np.int64(1))
    return Rows(*rows), d_logits
