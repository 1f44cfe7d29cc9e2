"""cuDNN's flash attention over packed documents: no mask, memory linear in the number of tokens.

For cuDNN every document is a sequence of its own, found by the offset of its first element. The running program chooses
among calls with room for more and more documents: cuDNN visits all that there is room for. Where every row is one
document, the plain causal call is right; where there are more than the largest has room for, portable blocks compute.

The custom call is made here, because JAX's function for it asks for a GPU when it is traced, and multiplied the offsets
of keys by the heads of queries until 2026 (jax-ml/jax pull request 39521). Source of the call's arguments:
jax/_src/cudnn/fused_attention_stablehlo.py.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from mixtral_jax.config import UserError
from mixtral_jax.kernels.attention import UNUSUAL, AttentionInputs
from mixtral_jax.kernels.blockwise import attend
from mixtral_jax.precision import FULL

LEAST_ROOM, TOKENS_OF_A_DOCUMENT = 16, 512
ROOMIER = 4  # times as many documents in the next call
STATUS_RETURNING = 2  # version of the custom call's interface
HEAD_DIM_MULTIPLE, LARGEST_HEAD_DIM = 8, 256
LARGEST_OFFSET = 2**31 - 1  # offsets are 32-bit integers
MEMORY = (0, 2, 1, 3)  # cuDNN's results are [rows, heads, seq, head_dim], stored as [rows, seq, heads, head_dim]
# Contracted axes and batch axes of the products in a layout [rows, seq, heads, head_dim], as XLA wants them named.
FORWARD = {"bmm1": ((3, 3), (0, 2), (0, 2)), "bmm2": ((3, 1), (0, 1), (0, 2))}
BACKWARD = {
    "bmm1_grad_gemm1": ((2, 1), (0, 1), (0, 2)), "bmm1_grad_gemm2": ((3, 1), (0, 1), (0, 2)),
    "bmm2_grad_gemm1": ((2, 1), (0, 1), (0, 2)), "bmm2_grad_gemm2": ((3, 3), (0, 2), (0, 2)),
}  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def packed_attention(
    q: Float[Array, "rows seq heads head_dim"],
    k: Float[Array, "rows seq kv_heads head_dim"],
    v: Float[Array, "rows seq kv_heads head_dim"],
    segment_ids: Int[Array, "rows seq"],
    deterministic: bool = False,
) -> Float[Array, "rows seq heads head_dim"]:
    """Computes `kernels.attention` on one device, in types of two bytes.

    Raises:
        UserError: a head_dim that cuDNN lacks, or more elements than 32-bit offsets reach.
    """
    return _fwd(q, k, v, segment_ids, deterministic)[0]


def rooms(seq_len: int) -> tuple[int, ...]:
    """Documents of a row that calls are compiled for; statistics take 4 bytes for each, each head and token."""
    most, found = max(LEAST_ROOM, seq_len // TOKENS_OF_A_DOCUMENT), [1]
    while found[-1] < most:
        found.append(min(most, ROOMIER * found[-1]))
    return tuple(found)


def find_documents(
    segment_ids: Int[Array, "rows seq"], room: int
) -> tuple[Int[Array, " documents"], Int[Array, " places"], Int[Array, ""]]:
    """Finds the documents of all rows, one row after the other; padding is one more document.

    Args:
        segment_ids: a number for each document, equal for neighbours of the same one.
        room: documents a row, on average.

    Returns:
        Tokens of each of rows * room documents, 0 where there is none; its first token, counted through the rows, or
        the number of all tokens, for rows more; how many documents there are, perhaps more than there is room for.
    """
    rows = segment_ids.shape[0]
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    number = jnp.cumsum(begins)
    wanted = jnp.arange(1, rows * (room + 1) + 1)
    first = jnp.searchsorted(number, wanted, method="compare_all").astype(jnp.int32)
    return jnp.diff(first[: rows * room + 1]), first, number[-1]


def _fwd(q: Array, k: Array, v: Array, segment_ids: Array, deterministic: bool) -> tuple[Array, tuple[Array, ...]]:
    if q.shape[3] % HEAD_DIM_MULTIPLE or q.shape[3] > LARGEST_HEAD_DIM:
        raise UserError(
            f"kernels.attention=cudnn takes a model.head_dim of {HEAD_DIM_MULTIPLE} to {LARGEST_HEAD_DIM} in steps of "
            f"{HEAD_DIM_MULTIPLE}, not {q.shape[3]}: use kernels.attention=blockwise"
        )
    if math.prod(q.shape) > LARGEST_OFFSET:
        raise UserError(
            f"kernels.attention=cudnn reaches {LARGEST_OFFSET:,} elements, and the queries of a device are "
            f"{' x '.join(map(str, q.shape))}: raise train.microbatches"
        )
    sizes = rooms(q.shape[1])
    lengths, first, number = find_documents(segment_ids, sizes[-1])
    chosen = jnp.sum(number > q.shape[0] * jnp.array(sizes))  # the first with room enough

    def unusual(q: Array, k: Array, v: Array, lengths: Array, first: Array) -> tuple[Array, Array]:
        return _portable(segment_ids, q, k, v), jnp.zeros(_stats_shape(q, sizes[-1]), FULL)

    calls = [_with_room(_flash, room) for room in sizes]
    out, stats = jax.lax.switch(chosen, [*calls, unusual], q, k, v, lengths, first)
    return out, (q, k, v, segment_ids, lengths, first, chosen, out, stats)


def _bwd(deterministic: bool, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, segment_ids, lengths, first, chosen, out, stats = residuals

    def unusual(q: Array, k: Array, v: Array, lengths: Array, first: Array, d_out: Array, *_: Array) -> tuple:
        return tuple(map(_as_cudnn, jax.vjp(partial(_portable, segment_ids), q, k, v)[1](d_out)))

    gradients = partial(_flash_gradients, deterministic=deterministic)
    calls = [_with_room(gradients, room) for room in rooms(q.shape[1])]
    return *jax.lax.switch(chosen, [*calls, unusual], q, k, v, lengths, first, d_out, out, stats), None


packed_attention.defvjp(_fwd, _bwd)


def _with_room(function: Callable[..., Any], room: int) -> Callable[..., Any]:
    """Calls a function with the documents that it has room for; none to tell where rows are documents."""

    def call(q: Array, k: Array, v: Array, lengths: Array, first: Array, *others: Array) -> Any:
        rows = q.shape[0]
        if room == 1:
            return function(q, k, v, (), *others)
        lengths = lengths[: rows * room].reshape(rows, room)
        offsets = (first[: rows * (room + 1)].reshape(rows, room + 1) * x.shape[2] * x.shape[3] for x in (q, k))
        return jax.named_scope(UNUSUAL)(function)(q, k, v, (lengths, lengths, *offsets), *others)

    return call


@jax.named_scope(UNUSUAL)
def _portable(segment_ids: Array, q: Array, k: Array, v: Array) -> Array:
    return _as_cudnn(attend(AttentionInputs(q, k, v, segment_ids, segment_ids, jnp.zeros(1, jnp.int32))))


def _as_cudnn(x: Array) -> Array:
    """Asks for the order in memory that cuDNN takes and gives: XLA would choose that of the unusual branch for both."""
    return with_layout_constraint(x, Layout((0, 1, 2, 3)))


def _stats_shape(q: Array, room: int) -> tuple[int, ...]:
    return q.shape[0] * room, q.shape[2], q.shape[1]


def _flash(q: Array, k: Array, v: Array, places: tuple[Array, ...]) -> tuple[Array, Array]:
    """Output, and what the backward pass needs to know of each softmax."""
    room, most = places[0].shape[1] if places else 1, rooms(q.shape[1])[-1]
    shapes = [(_by_head(q), q.dtype), (_stats_shape(q, room), FULL)]
    out, stats = _call("__cudnn$fmhaSoftmax", shapes, q, k, v, places=places, products=FORWARD)
    return out.swapaxes(1, 2), jnp.pad(stats, ((0, q.shape[0] * (most - room)), (0, 0), (0, 0)))


def _flash_gradients(
    q: Array, k: Array, v: Array, places: tuple[Array, ...], d_out: Array, out: Array, stats: Array, deterministic: bool
) -> tuple[Array, ...]:
    shapes = [(_by_head(x), x.dtype) for x in (q, k, v)]
    stats = stats[: places[0].size if places else q.shape[0]]
    arrays = q, k, v, stats, d_out, out
    call = partial(_call, products=BACKWARD, deterministic=deterministic)
    gradients = call("__cudnn$fmhaSoftmaxBackward", shapes, *arrays, places=places)
    return tuple(d.swapaxes(1, 2) for d in gradients)


def _by_head(x: Array) -> tuple[int, ...]:
    return x.shape[0], x.shape[2], x.shape[1], x.shape[3]


def _call(
    target: str,
    shapes: list[tuple[tuple[int, ...], Any]],
    *arrays: Array,
    places: tuple[Array, ...],
    products: dict,
    deterministic: bool = False,
) -> list[Array]:
    """Calls cuDNN through XLA; the results lie in memory as [rows, seq, heads, head_dim].

    Args:
        target: name of the call.
        shapes: shapes and types of the results.
        arrays: queries, keys, and what else the call takes before documents.
        places: lengths of queries and of keys in tokens, and offsets in elements of their own arrays; none: a row is a
            document.
        products: contracted axes of what the call multiplies.
        deterministic: whether sums are in one order. XLA's own mark reaches the first of several equal calls alone, and
            the program ends where it looks for the others (jax 0.11.2).
    """
    q, k = arrays[:2]
    rows, seq_len, heads, head_dim = q.shape
    settings = {
        "algorithm": {
            "algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True, "workspace_size": "0",
        },
        "fmha_scale": head_dim**-0.5,
        "intermediate_tensor_shape": {
            "element_type": "BF16" if q.dtype.name.startswith("b") else "F16",
            "dimensions": [str(n) for n in (rows, heads, seq_len, k.shape[1])],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True, "mask_type": "PADDING_CAUSAL" if places else "CAUSAL",
        "dropout_rate": 0.0, "seed": 42, "sliding_window_length": 0,
        "max_seg_per_batch": places[0].shape[1] if places else 1, "is_paged_attention": False,
        "force_deterministic": deterministic,
    }  # fmt: skip
    for name, (contracted, left, right) in products.items():
        settings[f"{name}_dot_dimension_numbers"] = {
            "lhs_contracting_dimensions": [str(contracted[0])], "rhs_contracting_dimensions": [str(contracted[1])],
            "lhs_batch_dimensions": [str(n) for n in left], "rhs_batch_dimensions": [str(n) for n in right],
        }  # fmt: skip
    scratch = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA gives it the size that cuDNN asks for
    *results, _ = jax.ffi.ffi_call(
        target,
        [*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes), scratch],
        output_layouts=[*(MEMORY if len(shape) == 4 else None for shape, _ in shapes), None],
        custom_call_api_version=STATUS_RETURNING,
        legacy_backend_config=json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": settings}),
    )(*arrays, *places)
    return results
