"""Attention by blocks that is linear in memory and runs anywhere XLA runs.

Online softmax over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867) and the recomputing backward pass of
FlashAttention-2 (arXiv 2307.08691). Blocks that the causal mask or the documents hide are not computed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mixtral_jax.kernels.attention import AttentionInputs
from mixtral_jax.precision import FULL
from mixtral_jax.remat import save_for_backward

MASKED = -1e30  # finite, so that a row without any key gives no NaN
BLOCK = 256  # positions of queries and of keys that meet at once
SHORT = 512  # up to so many positions half a block, which wastes less beyond the diagonal, is faster


def attend(inputs: AttentionInputs, mesh: Mesh | None = None) -> Float[Array, "batch queries heads head_dim"]:
    """Computes `kernels.attention` for some of the queries."""
    q, k, v, q_segment_ids, segment_ids, starts = inputs
    batch, queries, heads, head_dim = q.shape
    kv_heads, chunks = k.shape[2], starts.shape[0]
    length = queries // chunks
    block = min(BLOCK // 2 if length <= SHORT else BLOCK, length)
    pad, pad_keys = -length % block, -k.shape[1] % block
    q = q.reshape(batch, chunks, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 3, 4, 1, 2, 5)
    q_segment_ids = q_segment_ids.reshape(batch, chunks, length)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if pad:
        q = jnp.pad(q, [(0, 0)] * 4 + [(0, pad), (0, 0)])
        q_segment_ids = jnp.pad(q_segment_ids, [(0, 0), (0, 0), (0, pad)])
    if pad_keys:
        k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, pad_keys), (0, 0)]) for x in (k, v))
        segment_ids = jnp.pad(segment_ids, [(0, 0), (0, pad_keys)])
    block_starts = (starts[:, None] + jnp.arange(0, length, block)).reshape(-1)
    merged = q.reshape(*q.shape[:3], -1, head_dim), q_segment_ids.reshape(batch, -1)
    out = _blockwise(merged[0], k, v, merged[1], segment_ids, block_starts, block).reshape(q.shape)[..., :length, :]
    return out.transpose(0, 3, 4, 1, 2, 5).reshape(batch, queries, heads, head_dim)


def _visible(segment_ids: Array, starts: Array, block: int) -> tuple[Array, Array]:
    """Finds the first and the last block of keys that any row of each block of queries can see; both ascend."""
    index = jnp.arange(segment_ids.shape[1])
    changed = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    document = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
    last = jnp.minimum((starts + block - 1) // block, segment_ids.shape[1] // block - 1)
    return jnp.min(jnp.take(document, starts, axis=1), axis=0) // block, last


def _scores(q: Array, k: Array, seg_q: Array, seg_k: Array, q_start: Array, k_start: Array) -> Array:
    """Masked scores [batch, kv_heads, group, block, block] of a block of queries with a block of keys."""
    block = q.shape[-2]
    s = jnp.einsum("bkgqh,bkth->bkgqt", q, k, preferred_element_type=FULL) * q.shape[-1] ** -0.5
    causal = (q_start + jnp.arange(block))[:, None] >= (k_start + jnp.arange(block))[None, :]
    same = seg_q[:, :, None] == seg_k[:, None, :]
    return jnp.where((causal & same)[:, None, None], s, MASKED)


def _at(x: Array, i: Array, block: int, axis: int = -2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=axis % x.ndim)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blockwise(q: Array, k: Array, v: Array, seg_q: Array, seg_k: Array, starts: Array, block: int) -> Array:
    return _blockwise_fwd(q, k, v, seg_q, seg_k, starts, block)[0]


def _blockwise_fwd(
    q: Array, k: Array, v: Array, seg_q: Array, seg_k: Array, starts: Array, block: int
) -> tuple[Array, tuple[Array, ...]]:
    first, last = _visible(seg_k, starts, block)

    def query_block(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        q_i, seg_i = _at(q, i, block), _at(seg_q, i, block, axis=1)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, peak, total = carry
            s = _scores(q_i, _at(k, j, block), seg_i, _at(seg_k, j, block, axis=1), starts[i], j * block)
            new_peak = jnp.maximum(peak, jnp.max(s, axis=-1))
            p = jnp.exp(s - new_peak[..., None])
            shrink = jnp.exp(peak - new_peak)
            update = jnp.einsum("bkgqt,bkth->bkgqh", p.astype(v.dtype), _at(v, j, block), preferred_element_type=FULL)
            return acc * shrink[..., None] + update, new_peak, total * shrink + jnp.sum(p, axis=-1)

        zero = jnp.zeros(q_i.shape, FULL)
        start = (zero, jnp.full(q_i.shape[:-1], MASKED, FULL), jnp.zeros(q_i.shape[:-1], FULL))
        acc, peak, total = jax.lax.fori_loop(first[i], last[i] + 1, key_block, start)
        return None, ((acc / total[..., None]).astype(q.dtype), peak + jnp.log(total))

    _, (out, logsumexp) = jax.lax.scan(query_block, None, jnp.arange(starts.size))
    out = jnp.moveaxis(out, 0, -3).reshape(q.shape)
    logsumexp = jnp.moveaxis(logsumexp, 0, -2).reshape(q.shape[:-1])
    out, logsumexp = save_for_backward((out, logsumexp))
    return out, (q, k, v, seg_q, seg_k, starts, out, logsumexp)


def _blockwise_bwd(block: int, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, seg_q, seg_k, starts, out, logsumexp = residuals
    first, last = _visible(seg_k, starts, block)
    delta = jnp.sum(d_out.astype(FULL) * out.astype(FULL), axis=-1)
    scale = q.shape[-1] ** -0.5

    def key_block(d_q: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_j, v_j, seg_j = _at(k, j, block), _at(v, j, block), _at(seg_k, j, block, axis=1)

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            q_i, d_out_i = _at(q, i, block), _at(d_out, i, block)
            s = _scores(q_i, k_j, _at(seg_q, i, block, axis=1), seg_j, starts[i], j * block)
            p = jnp.exp(s - _at(logsumexp, i, block, axis=-1)[..., None])
            d_v += jnp.einsum("bkgqt,bkgqh->bkth", p.astype(v.dtype), d_out_i, preferred_element_type=FULL)
            d_p = jnp.einsum("bkgqh,bkth->bkgqt", d_out_i, v_j, preferred_element_type=FULL)
            d_s = (p * (d_p - _at(delta, i, block, axis=-1)[..., None]) * scale).astype(q.dtype)
            d_k += jnp.einsum("bkgqt,bkgqh->bkth", d_s, q_i, preferred_element_type=FULL)
            d_q_i = _at(d_q, i, block) + jnp.einsum("bkgqt,bkth->bkgqh", d_s, k_j, preferred_element_type=FULL)
            return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, i * block, axis=d_q.ndim - 2), d_k, d_v

        # `first` and `last` ascend, so the blocks of queries that see block j are a run.
        zero = jnp.zeros(k_j.shape, FULL)
        d_q, d_k, d_v = jax.lax.fori_loop(jnp.sum(last < j), jnp.sum(first <= j), query_block, (d_q, zero, zero))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, FULL), jnp.arange(k.shape[-2] // block))
    d_k, d_v = (jnp.moveaxis(x, 0, -3).reshape(k.shape) for x in (d_k, d_v))
    return d_q.astype(q.dtype), d_k, d_v, None, None, None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
