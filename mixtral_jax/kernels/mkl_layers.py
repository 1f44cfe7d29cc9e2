"""Dense products and SwiGLU experts by oneMKL, with their derivatives.

The experts' weights come as one stack of all layers, and their gradients are added up in one stack in place: cutting a
layer's weights out and writing its gradients back would move more bytes than the products do.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.mkl import Layer, add_outer, grouped, grouped_add, multiply

Stacks = tuple[
    Array, Array, Array
]  # gate and up [layers, experts, d_model, d_ff], down [layers, experts, d_ff, d_model]


@jax.custom_vjp
def matmul(x: Float[Array, "rows inner"], w: Float[Array, "inner outer"]) -> Float[Array, "rows outer"]:
    """Computes x w."""
    return multiply(x, w)


def _matmul_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return multiply(x, w), (x, w)


def _matmul_bwd(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, w = residuals
    return multiply(d_out, w, "nt"), multiply(x, d_out, "tn")


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@jax.custom_vjp
def mkl_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: Stacks,
    layer: Layer,
    carried: Stacks,
) -> tuple[Float[Array, "rows d_model"], Stacks]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert of one layer.

    Args:
        rows: sorted by expert; those beyond the sum of `group_sizes` belong to nobody.
        group_sizes: rows of each expert.
        weights: of all layers; read, and constant for differentiation.
        layer: which one.
        carried: the same arrays, through which gradients flow. Hand the returned ones to the next layer: the gradients
            of all layers then meet in one stack.

    Returns:
        One output a row, zero for rows of nobody; `carried`.
    """
    return _fwd(rows, group_sizes, weights, layer, carried)[0]


def _fwd(rows: Array, group_sizes: Array, weights: Stacks, layer: Layer, carried: Stacks) -> tuple[Any, Any]:
    gate, up = grouped(rows, group_sizes, layer, weights[:2])
    (out,) = grouped(jax.nn.silu(gate) * up, group_sizes, layer, weights[2:])
    return (out, carried), (rows, group_sizes, weights, layer, gate, up)


def _bwd(residuals: Any, cotangents: tuple[Array, Stacks]) -> tuple[Any, ...]:
    rows, group_sizes, weights, layer, gate, up = residuals
    d_out, (d_w_gate, d_w_up, d_w_down) = cotangents
    (d_hidden,) = grouped(d_out, group_sizes, layer, weights[2:], transposed=True)
    hidden, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    d_gate, d_up = pull(d_hidden)
    (d_w_down,) = add_outer((d_w_down,), hidden, (d_out,), group_sizes, layer)
    d_w_gate, d_w_up = add_outer((d_w_gate, d_w_up), rows, (d_gate, d_up), group_sizes, layer)
    (d_rows,) = grouped(d_gate, group_sizes, layer, weights[:1], transposed=True)
    d_rows = grouped_add(d_rows, d_up, group_sizes, layer, weights[1])
    return d_rows, None, jax.tree.map(jnp.zeros_like, weights), None, (d_w_gate, d_w_up, d_w_down)


mkl_ffn.defvjp(_fwd, _bwd)
