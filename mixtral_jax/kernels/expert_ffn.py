"""The SwiGLU experts over rows that are sorted by expert: work for the chosen experts only; see `backends`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.backends import load
from mixtral_jax.kernels.quantized import EightBitProduct, quantized_ffn
from mixtral_jax.kernels.stored import StoredExperts


class ExpertStack(NamedTuple):
    """The experts of all layers, constant for differentiation, and which layer is meant."""

    w_gate: Float[Array, "layers experts d_model d_ff"]
    w_up: Float[Array, "layers experts d_model d_ff"]
    w_down: Float[Array, "layers experts d_ff d_model"]
    layer: Int[Array, ""]


class ExpertWeights(NamedTuple):
    """The experts of one layer; gradients flow to these arrays.

    A backend that reads the same numbers in the stack, if there is one, leaves the arrays alone: then XLA never cuts
    them out of the stack.
    """

    w_gate: Float[Array, "experts d_model d_ff"]
    w_up: Float[Array, "experts d_model d_ff"]
    w_down: Float[Array, "experts d_ff d_model"]
    stack: ExpertStack | StoredExperts | None = None

    def in_stack(self) -> ExpertStack:
        """Returns where to read them: in the stack, or in one of this layer alone."""
        w_gate, w_up, w_down, stack = self
        assert not isinstance(stack, StoredExperts)
        return stack or ExpertStack(w_gate[None], w_up[None], w_down[None], jnp.zeros((), jnp.int32))


def expert_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: ExpertWeights,
    *,
    backend: str,
    block_sizes: tuple[int, ...] = (),
    interpret: bool = False,
    eight_bit: DTypeLike | None = None,
    decoding: str = "stored",
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert.

    Args:
        rows: sorted by expert; those beyond the sum of `group_sizes` are padding.
        group_sizes: rows of each expert.
        weights: the experts.
        backend: of the table, but for `StoredExperts`; or `equal`, which requires groups of rows / experts each.
        block_sizes: rows of the blocks of `grouped_blocks`, largest first; see `choose_block_sizes`.
        interpret: run a kernel of the platform step by step, on a CPU.
        decoding: backend for `StoredExperts`.
        eight_bit: type that the products' factors are rounded to, see `quantized`; None: none.

    Returns:
        One output a row; padding rows are finite and otherwise unspecified.
    """
    sizes = group_sizes.astype(jnp.int32)
    w_gate, w_up, w_down, stack = weights
    if isinstance(stack, StoredExperts):
        return load("decoding", decoding).stored_ffn(rows, sizes, stack)  # type: ignore[no-any-return]
    if eight_bit is not None:
        product = EightBitProduct(eight_bit, backend, block_sizes[0] if block_sizes else 0, interpret)
        return quantized_ffn(rows, sizes, w_gate, w_up, w_down, product)
    if backend == "equal":
        x = rows.reshape(w_gate.shape[0], -1, rows.shape[1])
        gate, up = jnp.einsum("ecd,edf->ecf", x, w_gate), jnp.einsum("ecd,edf->ecf", x, w_up)
        return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, w_down).reshape(rows.shape)
    if backend == "ragged_dot":
        gate, up = jax.lax.ragged_dot(rows, w_gate, sizes), jax.lax.ragged_dot(rows, w_up, sizes)
        return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_down, sizes)
    engine = load("experts", backend)
    if backend == "grouped_blocks":
        out: Array = engine.grouped_blocks_ffn(rows, sizes, w_gate, w_up, w_down, block_sizes)
    elif backend == "hopper":
        out = engine.hopper_ffn(rows, sizes, weights)
    elif backend == "triton":
        out = engine.grouped_ffn(rows, sizes, w_gate, w_up, w_down, interpret)
    elif backend == "megablox":
        out = engine.megablox_ffn(rows, sizes, w_gate, w_up, w_down, interpret)
    else:
        out = engine.engine_ffn(rows, sizes, weights, backend)
    return out
