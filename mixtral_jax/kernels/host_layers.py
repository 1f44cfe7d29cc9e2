"""Dense products and SwiGLU experts by `host_products`, with their derivatives.

The experts' weights come as one stack of all layers, and their gradients are added up in one stack in place: cutting a
layer's weights out and writing its gradients back would move more bytes than the products do.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.host_products import Engine, Layer, add_outer, grouped, grouped_add, multiply

Stacks = tuple[
    Array, Array, Array
]  # gate and up [layers, experts, d_model, d_ff], down [layers, experts, d_ff, d_model]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "rows inner"], w: Float[Array, "inner outer"], engine: Engine) -> Float[Array, "rows outer"]:
    """Computes x w."""
    return multiply(x, w, engine)


def _matmul_fwd(x: Array, w: Array, engine: Engine) -> tuple[Array, tuple[Array, Array]]:
    return multiply(x, w, engine), (x, w)


def _matmul_bwd(engine: Engine, residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, w = residuals
    return multiply(d_out, w, engine, "nt"), multiply(x, d_out, engine, "tn")


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def in_place_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: Stacks,
    layer: Layer,
    carried: Stacks,
    engine: Engine,
) -> tuple[Float[Array, "rows d_model"], Stacks]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert of one layer.

    Args:
        rows: sorted by expert; those beyond the sum of `group_sizes` belong to nobody.
        group_sizes: rows of each expert.
        weights: of all layers; read, and constant for differentiation.
        layer: which one.
        carried: the same arrays, through which gradients flow. Hand the returned ones to the next layer: the gradients
            of all layers then meet in one stack.
        engine: who multiplies.

    Returns:
        One output a row, zero for rows of nobody; `carried`.
    """
    return _fwd(rows, group_sizes, weights, layer, carried, engine)[0]


def _fwd(
    rows: Array, group_sizes: Array, weights: Stacks, layer: Layer, carried: Stacks, engine: Engine
) -> tuple[Any, Any]:
    gate, up = grouped(rows, group_sizes, layer, weights[:2], engine)
    (out,) = grouped(jax.nn.silu(gate) * up, group_sizes, layer, weights[2:], engine)
    return (out, carried), (rows, group_sizes, weights, layer)


def _bwd(engine: Engine, residuals: Any, cotangents: tuple[Array, Stacks]) -> tuple[Any, ...]:
    """Computes gate and up again: kept for every layer, they are the largest of what a step keeps."""
    rows, group_sizes, weights, layer = residuals
    d_out, (d_w_gate, d_w_up, d_w_down) = cotangents
    gate, up = grouped(rows, group_sizes, layer, weights[:2], engine)
    (d_hidden,) = grouped(d_out, group_sizes, layer, weights[2:], engine, transposed=True)
    hidden, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    d_gate, d_up = pull(d_hidden)
    (d_w_down,) = add_outer((d_w_down,), hidden, (d_out,), group_sizes, layer, engine)
    d_w_gate, d_w_up = add_outer((d_w_gate, d_w_up), rows, (d_gate, d_up), group_sizes, layer, engine)
    (d_rows,) = grouped(d_gate, group_sizes, layer, weights[:1], engine, transposed=True)
    d_rows = grouped_add(d_rows, d_up, group_sizes, layer, weights[1], engine)
    return d_rows, None, jax.tree.map(jnp.zeros_like, weights), None, (d_w_gate, d_w_up, d_w_down)


in_place_ffn.defvjp(_fwd, _bwd)
