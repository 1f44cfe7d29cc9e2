"""Attention by JAX's splash kernel for TPU: causal, with document masks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mixtral_jax.config import UserError
from mixtral_jax.zigzag import column_order

AXIS = "context"  # the mesh axis whose devices share a sequence
SPLASH_BLOCKS = (512, 256, 128)  # positions
BLOCK_NAMES = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")  # of the kernel's options


def make_splash_kernel(mesh: Mesh, seq_len: int, heads: int) -> Any:
    """Builds the kernel with a mask for every part of the sequence; it is interpreted on a mesh of CPU devices."""
    ways = mesh.shape[AXIS]
    causal = splash_attention_mask.CausalMask((seq_len, seq_len))
    causal.q_sequence = column_order(seq_len, ways).astype(causal.q_sequence.dtype)
    block = next((size for size in SPLASH_BLOCKS if seq_len // ways % size == 0), 0)
    if not block:
        raise UserError(
            f"kernels.attention=splash takes multiples of {SPLASH_BLOCKS[-1]} tokens a device, and {seq_len} tokens "
            f"over mesh.context={ways} are not: change the length or use kernels.attention=blockwise"
        )
    blocks: Any = {f"block_{name}": block for name in BLOCK_NAMES}
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=ways,
        interpret=mesh.devices.flat[0].platform == "cpu",
    )


def splash_attention(
    kernel: Any,
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    q_ids: Int[Array, "batch queries"],
    ids: Int[Array, "batch seq"],
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes `kernels.attention` of this device's queries by a kernel that was made for its mesh."""
    segments = splash_attention_kernel.SegmentIds(q_ids, ids)
    by_head = [jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)]
    return jnp.swapaxes(jax.vmap(kernel)(*by_head, segments), 1, 2)
