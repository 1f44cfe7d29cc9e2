"""Attention by cuDNN, the door of `kernels.attention=cudnn`.

cuDNN takes packed documents as they are on GPUs from Hopper on, see `cudnn_packed`; on older ones, and along the mesh
axis `context`, where a device has not all queries of a document, it takes a mask, a matrix of queries and keys.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mixtral_jax.kernels.attention import AXIS, AttentionInputs
from mixtral_jax.kernels.gpu.cudnn_packed import packed_attention

PACKS_FROM = 9.0  # compute capability: Hopper


def attend(
    inputs: AttentionInputs, mesh: Mesh, deterministic: bool = False
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes `kernels.attention` of this device's queries.

    Raises:
        UserError: a head_dim that cuDNN lacks, or more elements than 32-bit offsets reach.
    """
    q, k, v, q_ids, ids, starts = inputs
    if mesh.shape[AXIS] == 1 and float(mesh.devices.flat[0].compute_capability) >= PACKS_FROM:
        return packed_attention(q, k, v, q_ids, deterministic)
    position = (starts[:, None] + jnp.arange(q.shape[1] // starts.size)).reshape(-1)
    causal = position[:, None] >= jnp.arange(k.shape[1])
    mask = causal & (q_ids[:, None, :, None] == ids[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
