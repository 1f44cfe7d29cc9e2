"""Dense matrix products; see `backends` for who computes them."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from mixtral_jax.kernels.backends import load
from mixtral_jax.precision import EXACT_PRODUCT


def contract(x: Float[Array, "..."], w: Float[Array, "..."], axes: int, *, backend: str) -> Float[Array, "..."]:
    """Sums products over the last axes of x and the first ones of w.

    Args:
        x: [..., *inner].
        w: [*inner, *outer].
        axes: how many axes are inner ones.
        backend: of `matmul`.

    Returns:
        [..., *outer].
    """
    if backend == "xla":
        return jnp.tensordot(x, w, axes)
    outer = w.shape[axes:]
    flat = (x.reshape(-1, math.prod(w.shape[:axes])), w.reshape(-1, math.prod(outer)))
    return load("matmul", backend).matmul(*flat, backend).reshape(*x.shape[: x.ndim - axes], *outer)  # type: ignore[no-any-return]


def exact_contract(
    x: Float[Array, "batch seq inner"], w: Float[Array, "inner outer"], *, backend: str
) -> Float[Array, "batch seq outer"]:
    """Multiplies in float32's own products on every platform, for what decides something.

    A backend computes the gradients alone.
    """
    if backend == "xla":
        return jnp.einsum("bsd,de->bse", x, w, precision=EXACT_PRODUCT)
    out: Array = load("matmul", backend).exact_matmul(x.reshape(-1, x.shape[-1]), w, backend)
    return out.reshape(*x.shape[:-1], -1)
