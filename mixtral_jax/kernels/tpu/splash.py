"""Attention by JAX's splash kernel for TPU: causal, with document masks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mixtral_jax.config import UserError
from mixtral_jax.kernels.attention import AXIS, AttentionInputs
from mixtral_jax.zigzag import column_order

SPLASH_BLOCKS = (512, 256, 128)  # positions
BLOCK_NAMES = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")  # of the kernel's options


def make_kernel(mesh: Mesh, seq_len: int, heads: int) -> tuple[Any, Any]:
    """Builds the kernel with a mask for every part of the sequence; it is interpreted on a mesh of CPU devices.

    Returns:
        The kernel, a tree of arrays, and how it is split over the mesh.

    Raises:
        UserError: a length that the kernel does not take.
    """
    axis_size = mesh.shape[AXIS]
    causal = splash_attention_mask.CausalMask((seq_len, seq_len))
    causal.q_sequence = column_order(seq_len, axis_size).astype(causal.q_sequence.dtype)
    block = next((size for size in SPLASH_BLOCKS if seq_len // axis_size % size == 0), 0)
    if not block:
        raise UserError(
            f"kernels.attention=splash takes multiples of {SPLASH_BLOCKS[-1]} tokens a device, and {seq_len} tokens "
            f"over mesh.context={axis_size} are not: change the length or use kernels.attention=blockwise"
        )
    blocks: Any = {f"block_{name}": block for name in BLOCK_NAMES}
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=axis_size,
        interpret=mesh.devices.flat[0].platform == "cpu",
    )
    return kernel, kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, AXIS)))


def attend(inputs: AttentionInputs, kernel: Any) -> Float[Array, "batch queries heads head_dim"]:
    """Computes `kernels.attention` of this device's queries by a kernel that was made for its mesh."""
    segments = splash_attention_kernel.SegmentIds(inputs.q_segment_ids, inputs.segment_ids)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (inputs.q * inputs.q.shape[-1] ** -0.5, inputs.k, inputs.v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, segments), 1, 2)
