"""All losses: the only place that applies coefficients, masks and the pooling over layers.

Every term is a sum over this part of the batch divided by a count over the whole batch, so the parts' losses and
gradients add up to the whole batch's, however it was split.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mixtral_jax.config import LossesConfig, ObjectiveConfig
from mixtral_jax.data.batch import Batch
from mixtral_jax.kernels.cross_entropy import cross_entropy_sums, token_losses
from mixtral_jax.model.mixtral import Mixtral
from mixtral_jax.model.moe import RouterOutput
from mixtral_jax.precision import EXACT_PRODUCT, FULL
from mixtral_jax.training.preferences import AnswerCounts, compare_answers, count_answers, reference_point

PRETRAIN = ObjectiveConfig()


class Counts(NamedTuple):
    """Denominators, over the whole batch."""

    targets: Float[Array, ""]  # tokens to predict
    tokens: Float[Array, ""]  # tokens that are not padding
    answers: AnswerCounts | None = None  # where the batch holds judged answers


class RouterSums(NamedTuple):
    """What one part of the batch adds to the statistics of the routers, by layer."""

    assignments: Float[Array, "layers experts"]
    probs: Float[Array, "layers experts"]
    logsumexp_squared: Float[Array, " layers"]
    entropy: Float[Array, " layers"]  # nats
    dropped: Float[Array, " layers"]  # assignments


class Losses(NamedTuple):
    """The parts of the loss: what is reported; `total` is what is minimised."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]  # nats per target; of judged answers, of the better ones
    load_balance: Float[Array, ""]  # 1 at perfect balance
    router_z: Float[Array, ""]
    answers: dict[str, Float[Array, ""]]  # what else is reported where answers are learnt


def count(batch: Batch, mesh: Mesh | None = None) -> Counts:
    """Counts targets and tokens of a batch, and the answers of one that lies on a mesh and holds some."""
    answers = None if batch.reference is None or mesh is None else count_answers(batch, mesh)
    return Counts(jnp.sum(batch.loss_mask, dtype=FULL), jnp.sum(batch.segment_ids > 0, dtype=FULL), answers)


def router_sums(router: RouterOutput, batch: Batch) -> RouterSums:
    """Sums the router's statistics over the tokens that are not padding."""
    valid = (batch.segment_ids > 0).astype(FULL)
    num_experts = router.router_logits.shape[-1]
    logsumexp = jax.nn.logsumexp(router.router_logits, axis=-1)
    probs = jnp.exp(router.router_logits - logsumexp[..., None])
    entropy = logsumexp - jnp.sum(probs * router.router_logits, axis=-1)
    chosen = jnp.sum(jax.nn.one_hot(router.expert_indices, num_experts, dtype=FULL), axis=-2)
    return RouterSums(
        assignments=jnp.einsum("lbse,bs->le", chosen, valid, precision=EXACT_PRODUCT),
        probs=jnp.einsum("lbse,bs->le", probs, valid, precision=EXACT_PRODUCT),
        logsumexp_squared=jnp.einsum("lbs,bs->l", jnp.square(logsumexp), valid, precision=EXACT_PRODUCT),
        entropy=jnp.einsum("lbs,bs->l", entropy, valid, precision=EXACT_PRODUCT),
        dropped=router.dropped,
    )


def expert_load(assignments: Float[Array, "layers experts"]) -> Float[Array, "layers experts"]:
    """Turns counts into each expert's share of its layer's assignments; a layer without any gets zeros."""
    return assignments / jnp.maximum(jnp.sum(assignments, axis=-1, keepdims=True), 1)


def load_balance_loss(
    load: Float[Array, "layers experts"], probs: Float[Array, "layers experts"], tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """Computes the mean over layers of E * sum_e f_e * P_e: 1 at perfect balance, E when one expert takes all.

    Args:
        load: f, each expert's share of the assignments; no gradient flows through it.
        probs: sums of the router's probabilities over tokens.
        tokens: tokens that make P a mean.

    Source: arXiv 2101.03961, equation 4, with f over the k assignments of a token.
    """
    num_experts = load.shape[-1]
    products = jax.lax.stop_gradient(load) * probs / jnp.maximum(tokens, 1)
    return num_experts * jnp.mean(jnp.sum(products, axis=-1))


def compute_losses(
    model: Mixtral,
    batch: Batch,
    counts: Counts,
    load: Float[Array, "layers experts"] | None,
    config: LossesConfig,
    objective: ObjectiveConfig = PRETRAIN,
) -> tuple[Losses, RouterSums]:
    """Computes this part of the batch's share of every loss.

    Args:
        model: the decoder.
        batch: tokens, targets, segment_ids, positions, loss_mask of this part, each [batch, seq].
        counts: of the whole batch.
        load: f over the whole batch; None counts it over this part.
        config: coefficients.
        objective: what is learnt beside balance.
    """
    x, router = model(batch.tokens, batch.segment_ids, batch.positions)
    loss, cross_entropy, answers = _learnt(model, x, batch, counts, objective)
    sums = router_sums(router, batch)
    load = expert_load(sums.assignments) if load is None else load
    load_balance = load_balance_loss(load, sums.probs, counts.tokens)
    router_z = jnp.mean(sums.logsumexp_squared) / jnp.maximum(counts.tokens, 1)
    total = loss + config.load_balance * load_balance + config.router_z * router_z
    return Losses(total, cross_entropy, load_balance, router_z, answers), sums


def _learnt(
    model: Mixtral, x: Array, batch: Batch, counts: Counts, objective: ObjectiveConfig
) -> tuple[Array, Array, dict[str, Array]]:
    """The loss of the objective, the cross-entropy, and what else is reported."""
    runtime, head = model.runtime, model.head()
    where: dict[str, Any] = {"mesh": runtime.mesh, "chunk": runtime.loss_chunk}
    if objective.name == "preference":
        assert counts.answers is not None
        nats, _ = token_losses(x, head, batch.targets, backend=runtime.matmul, **where)
        mean_logits = jax.lax.stop_gradient(
            jnp.einsum("bsd,d->bs", x, jnp.mean(head, axis=1), preferred_element_type=FULL)
        )
        point = None
        if batch.mismatched is not None:
            other, frozen = batch.mismatched, jax.lax.stop_gradient(model)
            said, _ = frozen(other.tokens, other.segment_ids, other.positions)
            other_nats, _ = token_losses(said, frozen.head(), other.targets, backend=runtime.matmul, **where)
            point = reference_point(-other_nats, other, runtime.mesh)
        answers = (-nats, mean_logits, batch, counts.answers)
        loss, metrics = compare_answers(*answers, objective.losses, runtime.mesh, point)
        better = jnp.where(batch.loss_mask & (batch.segment_ids % 2 == 1), jax.lax.stop_gradient(nats), 0)
        return loss, jnp.sum(better) / jnp.maximum(counts.answers.better_tokens, 1), metrics
    predicted, targets = (x, head, batch.targets, batch.loss_mask), jnp.maximum(counts.targets, 1)
    sums = cross_entropy_sums(*predicted, backend=runtime.matmul, **where)
    cross_entropy, entropy, greedy = (each / targets for each in sums)
    told = {"entropy": entropy, "mean_token_accuracy": greedy} if objective.name != "pretrain" else {}
    return cross_entropy, cross_entropy, told
