"""Cross-entropy over a long vocabulary in chunks of tokens: the logits of one chunk exist at a time.

The gradient is made in the forward pass, while a chunk's logits are at hand, so that they are computed once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.backends import load
from mixtral_jax.precision import FULL
from mixtral_jax.sharding import VOCAB_AXIS, add_up, by_device, gather, spec


class CrossEntropySums(NamedTuple):
    """Of the positions that count."""

    nats: Float[Array, ""]  # -log softmax(x head)[target]; differentiable in x and head
    entropy: Float[Array, ""]  # of the predictions, in nats; like the next not differentiable
    greedy: Float[Array, ""]  # how many targets were the likeliest token


def cross_entropy_sums(
    x: Float[Array, "batch seq d_model"],
    head: Float[Array, "d_model vocab"],
    targets: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    *,
    mesh: Mesh,
    backend: str,
    chunk: int,
) -> CrossEntropySums:
    """Sums the cross-entropy over the masked positions, and what else their logits tell.

    Args:
        x: final activations.
        head: output matrix, columns split over the mesh axis `tensor`.
        targets: next tokens.
        mask: positions that count.
        mesh: where the arrays lie.
        backend: of `cross_entropy`; it is that of `matmul`.
        chunk: tokens of a device whose logits exist at once.
    """

    def local(x: Array, head: Array, targets: Array, mask: Array) -> tuple[Array, ...]:
        head = gather(head, mesh, "d_model", axis=0)
        flat = (a.reshape(-1, *a.shape[2:]) for a in (x, targets, mask))
        sums = _local_sums(head, *flat, min(chunk, targets.size), backend)
        return tuple(add_up(each, mesh, "data", "fsdp", "expert", "context") for each in sums)

    tokens, whole = spec(("batch", "sequence")), PartitionSpec()
    in_specs = (spec(("batch", "sequence", None)), spec(("d_model", "vocab")), tokens, tokens)
    return CrossEntropySums(*by_device(local, mesh, in_specs, (whole,) * 3)(x, head, targets, mask))


def token_losses(
    x: Float[Array, "batch seq d_model"],
    head: Float[Array, "d_model vocab"],
    targets: Int[Array, "batch seq"],
    *,
    mesh: Mesh,
    backend: str,
    chunk: int,
) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Computes -log softmax(x head)[target] of every position in nats; see `cross_entropy_sums`.

    Differentiable in x and head, by a second pass over the chunks: what each token's loss weighs is known last.

    Returns:
        The losses, and whether no other token is likelier than the target (what greedy decoding would choose).
    """

    def local(x: Array, head: Array, targets: Array) -> tuple[Array, Array]:
        head = gather(head, mesh, "d_model", axis=0)
        flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        losses, greedy = _local_losses(head, *flat, min(chunk, targets.size), backend)
        return losses.reshape(targets.shape), greedy.reshape(targets.shape)

    tokens = spec(("batch", "sequence"))
    in_specs = (spec(("batch", "sequence", None)), spec(("d_model", "vocab")), tokens)
    return by_device(local, mesh, in_specs, (tokens, tokens))(x, head, targets)


def _split(x: Array, chunk: int) -> Array:
    """[tokens, ...] to [chunks, chunk, ...], padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def _join(x: Array, tokens: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:tokens]


def _chunk_logits(x: Array, head: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """Returns this device's columns of the logits, and over all columns: logsumexp, logit at the target, its column."""
    logits = jnp.einsum("td,dv->tv", x, head, preferred_element_type=FULL)
    column = targets - jax.lax.axis_index(VOCAB_AXIS) * head.shape[1]
    here = (column >= 0) & (column < head.shape[1])
    peak = jax.lax.pmax(jnp.max(logits, axis=-1), VOCAB_AXIS)
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1), VOCAB_AXIS)
    picked = jnp.take_along_axis(logits, jnp.clip(column, 0, head.shape[1] - 1)[..., None], axis=-1)[..., 0]
    at_target = jax.lax.psum(jnp.where(here, picked, 0), VOCAB_AXIS)
    return logits, peak + jnp.log(total), at_target, jnp.where(here, column, -1)


def chunk_losses(
    x: Float[Array, "tokens d_model"], head: Float[Array, "d_model vocab"], targets: Int[Array, " tokens"], backend: str
) -> tuple[Float[Array, " tokens"], Bool[Array, " tokens"]]:
    """Computes what `token_losses` does for a chunk, on any platform."""
    logits, logsumexp, at_target, _ = _chunk_logits(x, head, targets)
    return logsumexp - at_target, at_target >= jax.lax.pmax(jnp.max(logits, axis=-1), VOCAB_AXIS)


def chunk_gradients(
    x: Float[Array, "tokens d_model"],
    head: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    mask: Bool[Array, " tokens"],
    d_head: Float[Array, "d_model vocab"],
    backend: str,
    weights: Float[Array, " tokens"] | None = None,
) -> tuple[
    Float[Array, " tokens"], Bool[Array, " tokens"], Float[Array, "tokens d_model"], Float[Array, "d_model vocab"]
]:
    """Computes what `chunk_losses` does and the gradients of the masked losses' sum; the head's is added to `d_head`.

    Each loss counts as often as its weight says, once if there are none.
    """
    logits, logsumexp, at_target, column = _chunk_logits(x, head, targets)
    hit = jnp.arange(head.shape[1]) == column[..., None]
    d_logits = jnp.where(mask[..., None], jnp.exp(logits - logsumexp[..., None]) - hit, 0)
    d_logits = (d_logits if weights is None else d_logits * weights[:, None]).astype(head.dtype)
    d_head += jnp.einsum("td,tv->dv", x, d_logits, preferred_element_type=FULL)
    greedy = at_target >= jax.lax.pmax(jnp.max(logits, axis=-1), VOCAB_AXIS)
    return logsumexp - at_target, greedy, jnp.einsum("tv,dv->td", d_logits, head), d_head


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _local_sums(head: Array, x: Array, targets: Array, mask: Array, chunk: int, backend: str) -> tuple[Array, ...]:
    return _local_fwd(head, x, targets, mask, chunk, backend)[0]


def _local_fwd(
    head: Array, x: Array, targets: Array, mask: Array, chunk: int, backend: str
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    engine = load("cross_entropy", backend)

    def body(carry: tuple[Array, Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], Array]:
        total, hits, d_head = carry
        x_c, targets_c, mask_c = inputs
        nats, greedy, d_x, d_head = engine.chunk_gradients(x_c, head, targets_c, mask_c, d_head, backend)
        hits += jnp.sum(mask_c & greedy, dtype=FULL)
        return (total + jnp.sum(jnp.where(mask_c, nats, 0)), hits, d_head), d_x

    start = (jnp.zeros((), FULL), jnp.zeros((), FULL), jnp.zeros(head.shape, FULL))
    (nats, greedy, d_head), d_x = jax.lax.scan(body, start, tuple(_split(a, chunk) for a in (x, targets, mask)))
    d_x = _join(d_x, x.shape[0])
    # <x, d_x> is the mean logit under the prediction less that of the target.
    mean = jax.lax.psum(jnp.sum(x.astype(FULL) * d_x.astype(FULL)), VOCAB_AXIS)
    return (nats, nats - mean, greedy), (d_x.astype(x.dtype), d_head)


def _local_bwd(
    chunk: int, backend: str, residuals: tuple[Array, Array], d_sums: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    d_x, d_head = residuals
    # The sums are the same on every device of the vocabulary axis; their derivative is the sum of their cotangents.
    scale = jax.lax.psum(d_sums[0], VOCAB_AXIS)
    return (d_head * scale).astype(d_x.dtype), d_x * scale.astype(d_x.dtype), None, None


_local_sums.defvjp(_local_fwd, _local_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _local_losses(head: Array, x: Array, targets: Array, chunk: int, backend: str) -> tuple[Array, Array]:
    engine = load("cross_entropy", backend)

    def body(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        nats, greedy = engine.chunk_losses(inputs[0], head, inputs[1], backend)
        return nats, greedy

    losses, greedy = jax.lax.map(body, (_split(x, chunk), _split(targets, chunk)))
    return _join(losses, targets.size), _join(greedy, targets.size)


def _losses_fwd(head: Array, x: Array, targets: Array, chunk: int, backend: str) -> tuple[Any, tuple[Array, ...]]:
    return _local_losses(head, x, targets, chunk, backend), (head, x, targets)


def _losses_bwd(
    chunk: int, backend: str, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    head, x, targets = residuals
    engine = load("cross_entropy", backend)
    weights = jax.lax.psum(cotangents[0], VOCAB_AXIS)  # as in `_local_bwd`

    def body(d_head: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        x_c, targets_c, weights_c = inputs
        *_, d_x, d_head = engine.chunk_gradients(x_c, head, targets_c, weights_c != 0, d_head, backend, weights_c)
        return d_head, d_x

    chunks = tuple(_split(a, chunk) for a in (x, targets, weights))
    d_head, d_x = jax.lax.scan(body, jnp.zeros(head.shape, FULL), chunks)
    return d_head.astype(head.dtype), _join(d_x, x.shape[0]).astype(x.dtype), None


_local_losses.defvjp(_losses_fwd, _losses_bwd)
