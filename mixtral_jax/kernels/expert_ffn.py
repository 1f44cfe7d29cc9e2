"""The SwiGLU experts over rows that are sorted by expert: work for the chosen experts only.

Backends: `blocked` loops over each expert's active blocks with a dynamic trip count and runs anywhere XLA runs;
`ragged_dot` is XLA's grouped product, dense on CPU and CUDA, and on TPU dense in the gradient of the weights;
`mkl` is oneMKL's on one CPU, `megablox` JAX's grouped kernel for TPU, `triton` ours for GPUs, forward and both
gradients. `equal` serves buffers of one size.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.blocked import blocked_ffn
from mixtral_jax.kernels.cpu.layers import in_place_ffn
from mixtral_jax.kernels.cpu.matmul import ENGINES
from mixtral_jax.kernels.quantized import EightBitProduct, quantized_ffn

ExpertsKernel = Literal["blocked", "amx", "mkl", "ragged_dot", "megablox", "triton", "equal"]


def expert_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    w_gate: Float[Array, "experts d_model d_ff"],
    w_up: Float[Array, "experts d_model d_ff"],
    w_down: Float[Array, "experts d_ff d_model"],
    *,
    backend: ExpertsKernel,
    block_sizes: tuple[int, ...] = (),
    interpret: bool = False,
    eight_bit: DTypeLike | None = None,
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert.

    Args:
        rows: sorted by expert; those beyond the sum of `group_sizes` belong to nobody.
        group_sizes: rows of each expert.
        w_gate, w_up, w_down: the experts.
        backend: see the module; `equal` requires every group to be rows / experts long.
        block_sizes: rows of the blocks of `blocked`, largest first; see `choose_block_sizes`.
        interpret: run a kernel of the platform step by step, on a CPU.
        eight_bit: type that the products' factors are rounded to, see `quantized`; None: none.

    Returns:
        One output a row; rows of nobody are finite and otherwise unspecified.
    """
    if eight_bit is not None:
        assert backend not in (*ENGINES, "triton")  # see `choose_experts`
        product = EightBitProduct(eight_bit, backend, block_sizes[0] if block_sizes else 0, interpret)
        return quantized_ffn(rows, group_sizes, w_gate, w_up, w_down, product)
    if backend == "blocked":
        return blocked_ffn(rows, group_sizes, w_gate, w_up, w_down, block_sizes)
    if backend in ENGINES:
        stacks = (w_gate[None], w_up[None], w_down[None])
        sizes, layer, ones = group_sizes.astype(jnp.int32), jnp.zeros((), jnp.int32), jnp.ones(len(rows), rows.dtype)
        return in_place_ffn(rows, sizes, ones, jax.lax.stop_gradient(stacks), layer, stacks, backend)[0]
    if backend == "equal":
        x = rows.reshape(w_gate.shape[0], -1, rows.shape[1])
        gate, up = jnp.einsum("ecd,edf->ecf", x, w_gate), jnp.einsum("ecd,edf->ecf", x, w_up)
        return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, w_down).reshape(rows.shape)
    sizes = group_sizes.astype(jnp.int32)
    if backend == "ragged_dot":
        gate, up = jax.lax.ragged_dot(rows, w_gate, sizes), jax.lax.ragged_dot(rows, w_up, sizes)
        return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_down, sizes)
    if backend == "triton":
        from mixtral_jax.kernels.gpu.triton_grouped import grouped_ffn

        return grouped_ffn(rows, sizes, w_gate, w_up, w_down, interpret)
    from mixtral_jax.kernels.tpu.megablox import megablox_ffn

    return megablox_ffn(rows, sizes, w_gate, w_up, w_down, interpret)
