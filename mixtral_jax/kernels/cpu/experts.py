"""SwiGLU experts by the engines' products, forward and backward.

The weights are read in the stack of all layers where there is one: cutting a layer's weights out of it would move more
bytes than the products do.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.cpu.matmul import grouped, grouped_add, outer_products
from mixtral_jax.kernels.cpu.swiglu import swiglu, swiglu_gradients
from mixtral_jax.kernels.expert_ffn import ExpertWeights
from mixtral_jax.remat import save_for_backward


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def engine_ffn(
    rows: Float[Array, "rows d_model"], group_sizes: Int[Array, " experts"], weights: ExpertWeights, engine: str
) -> Float[Array, "rows d_model"]:
    """Computes `expert_ffn`; padding rows become zero."""
    return _fwd(rows, group_sizes, weights, engine)[0]


def _fwd(rows: Array, group_sizes: Array, weights: ExpertWeights, engine: str) -> tuple[Array, tuple[Any, ...]]:
    stack = weights.in_stack()
    gate, up = grouped(rows, group_sizes, stack.layer, (stack.w_gate, stack.w_up), engine)
    if gate.shape[1] <= rows.shape[1]:  # wider ones, saved for every layer, would be the largest of what a step saves
        gate, up = save_for_backward((gate, up))
    (out,) = grouped(swiglu(gate, up), group_sizes, stack.layer, (stack.w_down,), engine)
    return save_for_backward(out), (rows, group_sizes, stack, gate, up)


def _bwd(engine: str, residuals: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    rows, sizes, (w_gate, w_up, w_down, layer), gate, up = residuals
    (d_hidden,) = grouped(d_out, sizes, layer, (w_down,), engine, transposed=True)
    d_gate, d_up, hidden = swiglu_gradients(gate, up, d_hidden)
    (d_w_down,) = outer_products(hidden, (d_out,), sizes, engine)
    d_w_gate, d_w_up = outer_products(rows, (d_gate, d_up), sizes, engine)
    (d_rows,) = grouped(d_gate, sizes, layer, (w_gate,), engine, transposed=True)
    d_rows = grouped_add(d_rows, d_up, sizes, layer, w_up, engine)
    return d_rows, None, ExpertWeights(d_w_gate, d_w_up, d_w_down, None)


engine_ffn.defvjp(_fwd, _bwd)
