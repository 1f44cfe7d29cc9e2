"""Causal attention with document masks on a mesh: one function, four backends.

`blockwise` is portable and linear in memory. `amx` is for float32 on one CPU, see `amx_attention`. `cudnn` and
`splash` are the platforms' kernels. cuDNN takes packed documents as they are on GPUs from Hopper on, see
`cudnn_packed`; on older ones, and along the mesh axis `context`, where a device has not all queries of a document, it
takes a mask, a matrix of queries and keys.

Along the mesh axis `context` every device computes its own queries, against keys and values of whole sequences that it
gathers. Columns come in the order of `zigzag`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.blockwise import blockwise_attention
from mixtral_jax.kernels.cpu.amx_attention import amx_attention
from mixtral_jax.kernels.gpu.cudnn_packed import packed_attention
from mixtral_jax.sharding import by_device, spec
from mixtral_jax.zigzag import chunk_starts, in_order

AXIS = "context"  # the mesh axis whose devices share a sequence
PACKS_FROM = 9.0  # compute capability: Hopper
MOVES = ("all_gather", "concatenate", "pad", "reshape", "rev", "slice", "squeeze", "transpose")


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"],
    *,
    mesh: Mesh,
    backend: Literal["blockwise", "amx", "cudnn", "splash"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Computes softmax(q k / sqrt(head_dim)) v over the earlier positions of the same segment.

    Args:
        q: queries; head h reads key/value head h // (heads / kv_heads).
        k, v: keys and values.
        segment_ids: number of each position's document; attention stays within equal numbers. A row's numbers never
            decrease with the position, except that padding (0) may follow.
        mesh: where the arrays lie.
        backend: see the module.

    Raises:
        UserError: a length that splash does not take, or more elements than cuDNN does.
    """
    ways, seq_len = mesh.shape[AXIS], q.shape[1]
    packs = ways == 1 and backend == "cudnn" and float(mesh.devices.flat[0].compute_capability) >= PACKS_FROM
    queries, keys = spec(("batch", "sequence", "heads", None)), spec(("batch", "sequence", "kv_heads", None))
    kernel = None
    if backend == "splash":  # takes a second to import
        from mixtral_jax.kernels.tpu import splash

        kernel = splash.make_splash_kernel(mesh, seq_len, q.shape[2] // mesh.shape["tensor"])
    splits = kernel and kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, AXIS)))

    def local(q: Array, k: Array, v: Array, q_ids: Array, kernel: Any) -> Array:
        ids, starts = q_ids, chunk_starts(seq_len, ways, 0)
        if ways > 1:
            k, v, ids = (in_order(jax.lax.all_gather(a, AXIS, axis=1, tiled=True), ways) for a in (k, v, ids))
            starts = chunk_starts(seq_len, ways, jax.lax.axis_index(AXIS))
        if backend == "splash":
            return splash.splash_attention(kernel, q, k, v, q_ids, ids)
        if backend == "amx":
            return amx_attention(q, k, v, q_ids)
        if packs:
            return packed_attention(q, k, v, q_ids)
        if backend == "cudnn":
            return _cudnn(q, k, v, q_ids, ids, starts)
        return blockwise_attention(q, k, v, q_ids, ids, starts)

    return by_device(
        jax.checkpoint(local, policy=_all_but_what_moves, prevent_cse=False) if ways > 1 else local,
        mesh,
        (queries, keys, keys, spec(("batch", "sequence")), splits),
        queries,
    )(q, k, v, segment_ids, kernel)


def _all_but_what_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """Says what is kept for the backward pass: not keys and values of whole sequences, in whatever order."""
    return primitive.name not in MOVES


def _cudnn(q: Array, k: Array, v: Array, q_ids: Array, ids: Array, starts: Array) -> Array:
    position = (starts[:, None] + jnp.arange(q.shape[1] // starts.size)).reshape(-1)
    causal = position[:, None] >= jnp.arange(k.shape[1])
    mask = causal & (q_ids[:, None, :, None] == ids[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
