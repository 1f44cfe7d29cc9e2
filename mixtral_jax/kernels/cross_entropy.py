"""Cross-entropy over a long vocabulary in chunks of tokens: the logits of one chunk exist at a time.

The gradient is made in the forward pass, while a chunk's logits are at hand, so that they are computed once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.cpu.matmul import Products, add_product, multiply
from mixtral_jax.kernels.cpu.softmax import differentiate, summarize
from mixtral_jax.precision import FULL
from mixtral_jax.sharding import VOCAB_AXIS, add_up, by_device, gather, spec


def cross_entropy_sum(
    x: Float[Array, "batch seq d_model"],
    head: Float[Array, "d_model vocab"],
    targets: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    *,
    mesh: Mesh,
    products: Products,
    chunk: int,
) -> Float[Array, ""]:
    """Sums -log softmax(x head)[target] over the masked positions, in nats; differentiable in x and head.

    Args:
        x: final activations.
        head: output matrix, columns split over the mesh axis `tensor`.
        targets: next tokens.
        mask: positions that count.
        mesh: where the arrays lie.
        products: who multiplies.
        chunk: tokens of a device whose logits exist at once.
    """

    def local(x: Array, head: Array, targets: Array, mask: Array) -> Array:
        head = gather(head, mesh, "d_model", axis=0)
        flat = (a.reshape(-1, *a.shape[2:]) for a in (x, targets, mask))
        total = _local_sum(head, *flat, min(chunk, targets.size), products)
        return add_up(total, mesh, "data", "fsdp", "expert", "context")

    tokens = spec(("batch", "sequence"))
    in_specs = (spec(("batch", "sequence", None)), spec(("d_model", "vocab")), tokens, tokens)
    return by_device(local, mesh, in_specs, PartitionSpec())(x, head, targets, mask)


def token_losses(
    x: Float[Array, "batch seq d_model"],
    head: Float[Array, "d_model vocab"],
    targets: Int[Array, "batch seq"],
    *,
    mesh: Mesh,
    products: Products,
    chunk: int,
) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Computes -log softmax(x head)[target] of every position in nats, forward only; see `cross_entropy_sum`.

    Returns:
        The losses, and whether no other token is likelier than the target (what greedy decoding would choose).
    """

    def local(x: Array, head: Array, targets: Array) -> tuple[Array, Array]:
        head = gather(head, mesh, "d_model", axis=0)

        def body(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            if products == "xla":
                logits, logsumexp, at_target, _ = _chunk_logits(inputs[0], head, inputs[1])
                return logsumexp - at_target, at_target >= jax.lax.pmax(jnp.max(logits, axis=-1), VOCAB_AXIS)
            rows = summarize(multiply(inputs[0], head, products), inputs[1])
            return rows.log_total - rows.at_target, rows.at_target >= rows.peak

        size = min(chunk, targets.size)
        chunks = (_split(x.reshape(-1, x.shape[-1]), size), _split(targets.reshape(-1), size))
        losses, greedy = (_join(out, targets.size).reshape(targets.shape) for out in jax.lax.map(body, chunks))
        return losses, greedy

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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _local_sum(head: Array, x: Array, targets: Array, mask: Array, chunk: int, products: Products) -> Array:
    def body(total: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        x_c, targets_c, mask_c = inputs
        if products == "xla":
            _, logsumexp, at_target, _ = _chunk_logits(x_c, head, targets_c)
        else:
            logsumexp, at_target, _ = summarize(multiply(x_c, head, products), targets_c)
        return total + jnp.sum(jnp.where(mask_c, logsumexp - at_target, 0)), None

    return jax.lax.scan(body, jnp.zeros((), FULL), tuple(_split(a, chunk) for a in (x, targets, mask)))[0]


def _local_fwd(
    head: Array, x: Array, targets: Array, mask: Array, chunk: int, products: Products
) -> tuple[Array, tuple[Array, Array]]:
    def body(carry: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, d_head = carry
        x_c, targets_c, mask_c = inputs
        if products != "xla":
            rows, d_logits = differentiate(multiply(x_c, head, products), targets_c, mask_c)
            total += jnp.sum(jnp.where(mask_c, rows.log_total - rows.at_target, 0))
            return (total, add_product(d_head, x_c, d_logits, products)), multiply(d_logits, head, products, "nt")
        logits, logsumexp, at_target, column = _chunk_logits(x_c, head, targets_c)
        total += jnp.sum(jnp.where(mask_c, logsumexp - at_target, 0))
        hit = jnp.arange(head.shape[1]) == column[..., None]
        d_logits = jnp.where(mask_c[..., None], jnp.exp(logits - logsumexp[..., None]) - hit, 0).astype(head.dtype)
        d_head += jnp.einsum("td,tv->dv", x_c, d_logits, preferred_element_type=FULL)
        return (total, d_head), jnp.einsum("tv,dv->td", d_logits, head)

    start = (jnp.zeros((), FULL), jnp.zeros(head.shape, FULL))
    (total, d_head), d_x = jax.lax.scan(body, start, tuple(_split(a, chunk) for a in (x, targets, mask)))
    return total, (_join(d_x, x.shape[0]).astype(x.dtype), d_head)


def _local_bwd(
    chunk: int, products: Products, residuals: tuple[Array, Array], d_total: Array
) -> tuple[Array | None, ...]:
    d_x, d_head = residuals
    # The sum is the same on every device of the vocabulary axis; its derivative is the sum of their cotangents.
    scale = jax.lax.psum(d_total, VOCAB_AXIS)
    return (d_head * scale).astype(d_x.dtype), d_x * scale.astype(d_x.dtype), None, None


_local_sum.defvjp(_local_fwd, _local_bwd)
