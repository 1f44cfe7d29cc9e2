"""Dense products and SwiGLU experts by `matmul`, with their derivatives.

The experts' weights come as one stack of all layers, and their gradients are added up in one stack in place: cutting a
layer's weights out and writing its gradients back would move more bytes than the products do.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.cpu.matmul import Engine, Layer, grouped, grouped_add, multiply, set_outer_products
from mixtral_jax.kernels.cpu.swiglu import swiglu, swiglu_gradients
from mixtral_jax.precision import EXACT_PRODUCT
from mixtral_jax.remat import keep

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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def exact_matmul(
    x: Float[Array, "rows inner"], w: Float[Array, "inner outer"], engine: Engine
) -> Float[Array, "rows outer"]:
    """Computes x w in float32's own products, and only the gradients as `matmul` does: for what decides something."""
    return jnp.matmul(x, w, precision=EXACT_PRODUCT)


def _exact_matmul_fwd(x: Array, w: Array, engine: Engine) -> tuple[Array, tuple[Array, Array]]:
    return exact_matmul(x, w, engine), (x, w)


exact_matmul.defvjp(_exact_matmul_fwd, _matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def in_place_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    row_weights: Float[Array, " rows"],
    weights: Stacks,
    layer: Layer,
    carried: Stacks,
    engine: Engine,
) -> tuple[Float[Array, "rows d_model"], Stacks]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert of one layer, times the row's weight.

    The weight goes in before the last product, so that no result is kept for the weight's gradient.

    Args:
        rows: sorted by expert; those beyond the sum of `group_sizes` belong to nobody.
        group_sizes: rows of each expert.
        row_weights: factors of the results.
        weights: of all layers; read, and constant for differentiation.
        layer: which one.
        carried: the same arrays, through which gradients flow. Hand the returned ones to the next layer: the gradients
            of all layers then meet in one stack, of which each layer, used once, writes its part.
        engine: who multiplies.

    Returns:
        One output a row, zero for rows of nobody; `carried`.
    """
    return _fwd(rows, group_sizes, row_weights, weights, layer, carried, engine)[0]


def _fwd(
    rows: Array, group_sizes: Array, row_weights: Array, weights: Stacks, layer: Layer, carried: Stacks, engine: Engine
) -> tuple[Any, Any]:
    gate, up = grouped(rows, group_sizes, layer, weights[:2], engine)
    if gate.shape[1] <= rows.shape[1]:  # wider ones, kept for every layer, would be the largest of what a step keeps
        gate, up = keep((gate, up))
    (out,) = grouped(swiglu(gate, up, row_weights), group_sizes, layer, weights[2:], engine)
    return (out, carried), (rows, group_sizes, row_weights, weights, layer, gate, up)


def _bwd(engine: Engine, residuals: Any, cotangents: tuple[Array, Stacks]) -> tuple[Any, ...]:
    rows, group_sizes, row_weights, weights, layer, gate, up = residuals
    d_out, (d_w_gate, d_w_up, d_w_down) = cotangents
    (d_hidden,) = grouped(d_out, group_sizes, layer, weights[2:], engine, transposed=True)
    d_gate, d_up, d_row_weights, hidden = swiglu_gradients(gate, up, row_weights, d_hidden)
    (d_w_down,) = set_outer_products((d_w_down,), hidden, (d_out,), group_sizes, layer, engine)
    d_w_gate, d_w_up = set_outer_products((d_w_gate, d_w_up), rows, (d_gate, d_up), group_sizes, layer, engine)
    (d_rows,) = grouped(d_gate, group_sizes, layer, weights[:1], engine, transposed=True)
    d_rows = grouped_add(d_rows, d_up, group_sizes, layer, weights[1], engine)
    no_gradient = jax.tree.map(jnp.zeros_like, weights)
    return d_rows, None, d_row_weights, no_gradient, None, (d_w_gate, d_w_up, d_w_down)


in_place_ffn.defvjp(_fwd, _bwd)


@jax.custom_vjp
def collect(x: Array, carried: Stacks, memory: Stacks) -> Array:
    """Returns x; behind the last layer, it lets the gradients of `carried` be written over `memory`, not into zeros."""
    return x


def _collect_fwd(x: Array, carried: Stacks, memory: Stacks) -> tuple[Array, Stacks]:
    return x, memory


def _collect_bwd(memory: Stacks, d_x: Array) -> tuple[Array, Stacks, None]:
    return d_x, memory, None


collect.defvjp(_collect_fwd, _collect_bwd)
