"""Causal attention with document masks: one function, three backends.

`blockwise` is portable and memory-linear (online softmax over blocks of keys, Milakov and Gimelshein, arXiv 1805.02867;
the recomputing backward pass of FlashAttention-2, arXiv 2307.08691). `cudnn` and `splash` are the platforms' kernels.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.precision import FULL

MASKED = -1e30  # finite, so that a row without any key gives no NaN
BLOCK = 256  # positions of queries and of keys that meet at once


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"],
    *,
    backend: Literal["blockwise", "cudnn", "splash"],
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Computes softmax(q k / sqrt(head_dim)) v over the earlier positions of the same segment.

    Args:
        q: queries; head h reads key/value head h // (heads / kv_heads).
        k, v: keys and values.
        segment_ids: number of each position's document; attention stays within equal numbers. A row's numbers never
            decrease, except that padding (0) may follow.
        backend: see the module.
        interpret: run splash step by step on a CPU, which has no TPU to compile it for.
    """
    if backend == "cudnn":
        return _cudnn(q, k, v, segment_ids)
    if backend == "splash":
        return _splash(q, k, v, segment_ids, interpret)
    return _blockwise_rows(q, k, v, segment_ids)


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation="cudnn")


def _splash(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads = q.shape[1], q.shape[2]
    causal = splash_attention_mask.CausalMask((length, length))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * heads),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    by_head = [jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)]
    return jnp.swapaxes(jax.vmap(kernel)(*by_head, segments), 1, 2)


def _blockwise_rows(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """Brings heads forward and positions to whole blocks, runs the blocks, and undoes both."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    block = min(BLOCK, length)
    pad = -length % block
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if pad:
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    out = _blockwise(q, k, v, segment_ids, block)[..., :length, :]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _first_key_block(segment_ids: Array, block: int) -> Array:
    """Finds for every block of queries the first block of keys that any of its rows can see."""
    index = jnp.arange(segment_ids.shape[1])
    changed = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
    return jnp.min(start[:, ::block], axis=0) // block


def _scores(q: Array, k: Array, seg_q: Array, seg_k: Array, i: Array, j: Array) -> Array:
    """Masked scores [batch, kv_heads, group, block, block] of query block i with key block j."""
    block = q.shape[-2]
    s = jnp.einsum("bkgqh,bkth->bkgqt", q, k, preferred_element_type=FULL) * q.shape[-1] ** -0.5
    causal = (i * block + jnp.arange(block))[:, None] >= (j * block + jnp.arange(block))[None, :]
    same = seg_q[:, :, None] == seg_k[:, None, :]
    return jnp.where((causal & same)[:, None, None], s, MASKED)


def _at(x: Array, i: Array, block: int, axis: int = -2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=axis % x.ndim)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q: Array, k: Array, v: Array, segment_ids: Array, block: int) -> Array:
    return _blockwise_fwd(q, k, v, segment_ids, block)[0]


def _blockwise_fwd(q: Array, k: Array, v: Array, segment_ids: Array, block: int) -> tuple[Array, tuple[Array, ...]]:
    blocks = q.shape[-2] // block
    first = _first_key_block(segment_ids, block)

    def query_block(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        q_i, seg_i = _at(q, i, block), _at(segment_ids, i, block, axis=1)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, peak, total = carry
            s = _scores(q_i, _at(k, j, block), seg_i, _at(segment_ids, j, block, axis=1), i, j)
            new_peak = jnp.maximum(peak, jnp.max(s, axis=-1))
            p = jnp.exp(s - new_peak[..., None])
            shrink = jnp.exp(peak - new_peak)
            update = jnp.einsum("bkgqt,bkth->bkgqh", p.astype(v.dtype), _at(v, j, block), preferred_element_type=FULL)
            return acc * shrink[..., None] + update, new_peak, total * shrink + jnp.sum(p, axis=-1)

        zero = jnp.zeros(q_i.shape, FULL)
        start = (zero, jnp.full(q_i.shape[:-1], MASKED, FULL), jnp.zeros(q_i.shape[:-1], FULL))
        acc, peak, total = jax.lax.fori_loop(first[i], i + 1, key_block, start)
        return None, ((acc / total[..., None]).astype(q.dtype), peak + jnp.log(total))

    _, (out, logsumexp) = jax.lax.scan(query_block, None, jnp.arange(blocks))
    out = jnp.moveaxis(out, 0, -3).reshape(q.shape)
    logsumexp = jnp.moveaxis(logsumexp, 0, -2).reshape(q.shape[:-1])
    return out, (q, k, v, segment_ids, out, logsumexp)


def _blockwise_bwd(block: int, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, segment_ids, out, logsumexp = residuals
    blocks = q.shape[-2] // block
    first = _first_key_block(segment_ids, block)
    delta = jnp.sum(d_out.astype(FULL) * out.astype(FULL), axis=-1)
    scale = q.shape[-1] ** -0.5

    def key_block(d_q: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_j, v_j, seg_j = _at(k, j, block), _at(v, j, block), _at(segment_ids, j, block, axis=1)

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            q_i, d_out_i = _at(q, i, block), _at(d_out, i, block)
            s = _scores(q_i, k_j, _at(segment_ids, i, block, axis=1), seg_j, i, j)
            p = jnp.exp(s - _at(logsumexp, i, block, axis=-1)[..., None])
            d_v += jnp.einsum("bkgqt,bkgqh->bkth", p.astype(v.dtype), d_out_i, preferred_element_type=FULL)
            d_p = jnp.einsum("bkgqh,bkth->bkgqt", d_out_i, v_j, preferred_element_type=FULL)
            d_s = (p * (d_p - _at(delta, i, block, axis=-1)[..., None]) * scale).astype(q.dtype)
            d_k += jnp.einsum("bkgqt,bkgqh->bkth", d_s, q_i, preferred_element_type=FULL)
            d_q_i = _at(d_q, i, block) + jnp.einsum("bkgqt,bkth->bkgqh", d_s, k_j, preferred_element_type=FULL)
            return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, i * block, axis=d_q.ndim - 2), d_k, d_v

        # `first` never decreases, so the blocks of queries that see block j are a run that starts at j.
        last = jnp.sum(first <= j)
        zero = jnp.zeros(k_j.shape, FULL)
        d_q, d_k, d_v = jax.lax.fori_loop(j, last, query_block, (d_q, zero, zero))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, FULL), jnp.arange(blocks))
    d_k, d_v = (jnp.moveaxis(x, 0, -3).reshape(k.shape) for x in (d_k, d_v))
    return d_q.astype(q.dtype), d_k, d_v, None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
