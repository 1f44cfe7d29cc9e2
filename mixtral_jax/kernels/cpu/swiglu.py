"""SwiGLU of rows with weights, forward and backward in one pass over memory, by functions of this process."""

import functools

import jax
from jaxtyping import Array, Float

from mixtral_jax.precision import FULL


@functools.cache
def _register() -> None:
    from mixtral_jax.kernels.cpu import intrinsics, swiglu_calls, xla_ffi

    intrinsics.know(intrinsics.SWIGLU, swiglu_calls.swiglu_task)
    xla_ffi.register("host_swiglu", swiglu_calls.swiglu)
    xla_ffi.register("host_swiglu_gradients", swiglu_calls.gradients)


def swiglu(
    gate: Float[Array, "rows d_ff"], up: Float[Array, "rows d_ff"], row_weights: Float[Array, " rows"]
) -> Float[Array, "rows d_ff"]:
    """Computes silu(gate) * up times each row's weight. Source: arXiv 2002.05202."""
    _register()
    return jax.ffi.ffi_call("host_swiglu", jax.ShapeDtypeStruct(gate.shape, FULL))(gate, up, row_weights)


def swiglu_gradients(
    gate: Float[Array, "rows d_ff"],
    up: Float[Array, "rows d_ff"],
    row_weights: Float[Array, " rows"],
    d_out: Float[Array, "rows d_ff"],
) -> tuple[Float[Array, "rows d_ff"], Float[Array, "rows d_ff"], Float[Array, " rows"], Float[Array, "rows d_ff"]]:
    """Computes the gradients of gate, up and the weights, and `swiglu` again, in the memory of the arguments."""
    _register()
    results = [jax.ShapeDtypeStruct(x.shape, FULL) for x in (gate, up, row_weights, d_out)]
    call = jax.ffi.ffi_call("host_swiglu_gradients", results, input_output_aliases={i: i for i in range(4)})
    d_gate, d_up, d_row_weights, out = call(gate, up, row_weights, d_out)
    return d_gate, d_up, d_row_weights, out
