"""Causal attention with document masks on a mesh: one function, whoever computes it; see `backends`.

Along the mesh axis `context` every device computes its own queries, against keys and values of whole sequences that it
gathers. Columns come in the order of `zigzag`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.backends import load
from mixtral_jax.sharding import by_device, spec
from mixtral_jax.zigzag import chunk_starts, in_order

AXIS = "context"  # the mesh axis whose devices share a sequence
UNUSUAL = "unusual"  # names the operations that stand in for a kernel that seldom cannot, for the planner
MOVES = ("all_gather", "concatenate", "pad", "reshape", "rev", "slice", "squeeze", "transpose")


class AttentionInputs(NamedTuple):
    """One device's queries, and the keys and values that they may see."""

    q: Float[Array, "batch queries heads head_dim"]
    k: Float[Array, "batch seq kv_heads head_dim"]
    v: Float[Array, "batch seq kv_heads head_dim"]
    q_segment_ids: Int[Array, "batch queries"]
    segment_ids: Int[Array, "batch seq"]
    starts: Int[Array, " chunks"]  # position of the first query of each chunk; chunks are of one length, and ascend


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"],
    *,
    mesh: Mesh,
    backend: str,
    deterministic: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Computes softmax(q k / sqrt(head_dim)) v over the earlier positions of the same segment.

    Args:
        q: queries; head h reads key/value head h // (heads / kv_heads).
        k: keys.
        v: values.
        segment_ids: number of each position's document; attention stays within equal numbers. A row's numbers never
            decrease with the position, except that padding (0) may follow.
        mesh: where the arrays lie.
        backend: of `attention`.
        deterministic: whether a GPU must sum in one order.

    Raises:
        UserError: a length that splash does not take, or more elements than cuDNN does.
    """
    axis_size, seq_len = mesh.shape[AXIS], q.shape[1]
    queries, keys = spec(("batch", "sequence", "heads", None)), spec(("batch", "sequence", "kv_heads", None))
    attend: Any = load("attention", backend).attend
    if backend == "cudnn":  # the others always do
        attend = partial(attend, deterministic=deterministic)
    kernel = splits = None
    if backend == "splash":  # its masks are arrays, split over the mesh like the queries
        kernel, splits = load("attention", backend).make_kernel(mesh, seq_len, q.shape[2] // mesh.shape["tensor"])

    def local(q: Array, k: Array, v: Array, q_ids: Array, kernel: Any) -> Array:
        ids, starts = q_ids, chunk_starts(seq_len, axis_size, 0)
        if axis_size > 1:
            k, v, ids = (in_order(jax.lax.all_gather(a, AXIS, axis=1, tiled=True), axis_size) for a in (k, v, ids))
            starts = chunk_starts(seq_len, axis_size, jax.lax.axis_index(AXIS))
        inputs = AttentionInputs(q, k, v, q_ids, ids, starts)
        out: Array = attend(inputs, mesh if kernel is None else kernel)
        return out

    return by_device(
        jax.checkpoint(local, policy=_all_but_what_moves, prevent_cse=False) if axis_size > 1 else local,
        mesh,
        (queries, keys, keys, spec(("batch", "sequence")), splits),
        queries,
    )(q, k, v, segment_ids, kernel)


def _all_but_what_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """Says what is kept for the backward pass: not keys and values of whole sequences, in whatever order."""
    return primitive.name not in MOVES
