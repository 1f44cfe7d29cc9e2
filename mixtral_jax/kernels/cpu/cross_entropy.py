"""A chunk of `kernels.cross_entropy` by an engine's products."""

from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.cpu.matmul import add_product, multiply
from mixtral_jax.kernels.cpu.softmax import differentiate, summarize


def chunk_losses(
    x: Float[Array, "tokens d_model"], head: Float[Array, "d_model vocab"], targets: Int[Array, " tokens"], engine: str
) -> tuple[Float[Array, " tokens"], Bool[Array, " tokens"]]:
    """Computes -log softmax(x head)[target], and whether no other token is likelier than the target."""
    rows = summarize(multiply(x, head, engine), targets)
    return rows.log_total - rows.at_target, rows.at_target >= rows.peak


def chunk_gradients(
    x: Float[Array, "tokens d_model"],
    head: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    mask: Bool[Array, " tokens"],
    d_head: Float[Array, "d_model vocab"],
    engine: str,
    weights: Float[Array, " tokens"] | None = None,
) -> tuple[
    Float[Array, " tokens"], Bool[Array, " tokens"], Float[Array, "tokens d_model"], Float[Array, "d_model vocab"]
]:
    """Computes the same and the gradients of the masked ones' sum, by weight; the head's is added to `d_head`."""
    rows, d_logits = differentiate(multiply(x, head, engine), targets, mask)
    weigh = lambda a: a if weights is None else a * weights[:, None].astype(a.dtype)  # noqa: E731
    d_head = add_product(d_head, weigh(x), d_logits, engine)
    d_x = weigh(multiply(d_logits, head, engine, "nt"))
    return rows.log_total - rows.at_target, rows.at_target >= rows.peak, d_x, d_head
