"""Losses that compare answers: formulas over the log-probabilities of whole answers, and the metrics that TRL names.

Every term is a sum over this part of the batch divided by a count over the whole batch, as in `losses`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid
from jaxtyping import Array, Float

from mixtral_jax.config import LossConfig, UserError
from mixtral_jax.data.batch import Batch
from mixtral_jax.data.splits import Documents
from mixtral_jax.precision import FULL
from mixtral_jax.sharding import constrain

# Losses that ask what the reference model says; the others never see it.
COMPARING = ("sigmoid", "ipo", "hinge", "sigmoid_norm", "kto")


class Side(NamedTuple):
    """The better, or the worse, answers of a batch: [rows, places], zero where there is none."""

    log_probs: Float[Array, "rows answers"]  # sum over the answer's tokens, nats
    reference: Float[Array, "rows answers"]  # the same of the reference model
    tokens: Float[Array, "rows answers"]
    point: Float[Array, ""] | float  # what KTO compares ratios with, of both sides together

    @property
    def there(self) -> Array:
        """Where there is an answer."""
        return self.tokens > 0

    @property
    def ratio(self) -> Array:
        """How much likelier the model finds the answer than the reference does, nats."""
        return self.log_probs - self.reference

    def mean(self, sums: Float[Array, "..."]) -> Float[Array, "..."]:
        """Turns sums over answers into means over their tokens."""
        return sums / jnp.maximum(self.tokens, 1)


class AnswerCounts(NamedTuple):
    """Denominators, over the whole batch."""

    pairs: Float[Array, ""]
    better: Float[Array, ""]
    worse: Float[Array, ""]
    better_tokens: Float[Array, ""]
    worse_tokens: Float[Array, ""]


Term = Callable[[Side, Side, AnswerCounts, LossConfig], Array]


def _over_pairs(values: Array, better: Side, worse: Side, counts: AnswerCounts) -> Array:
    return jnp.sum(jnp.where(better.there & worse.there, values, 0)) / jnp.maximum(counts.pairs, 1)


def sigmoid_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """DPO: arXiv 2305.18290, equation 7; label smoothing: arXiv 2305.18290's conservative form (E. Mitchell, 2023)."""
    logits = config.beta * (better.ratio - worse.ratio)
    smooth = config.label_smoothing
    values = -(1 - smooth) * log_sigmoid(logits) - smooth * log_sigmoid(-logits)
    return _over_pairs(values, better, worse, counts)


def hinge_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """SLiC's hinge on DPO's margin: arXiv 2305.10425 and 2309.06657, equation 7."""
    return _over_pairs(relu(1 - config.beta * (better.ratio - worse.ratio)), better, worse, counts)


def ipo_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """IPO: arXiv 2310.12036, equation 17, over means per token as its authors compute it."""
    margin = better.mean(better.ratio) - worse.mean(worse.ratio)
    return _over_pairs(jnp.square(margin - 1 / (2 * config.beta)), better, worse, counts)


def sigmoid_norm_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """DPO over means per token: arXiv 2411.15124, equation 6."""
    margin = better.mean(better.ratio) - worse.mean(worse.ratio)
    return _over_pairs(-log_sigmoid(config.beta * margin), better, worse, counts)


def simpo_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """SimPO: arXiv 2405.14734, equation 6; `margin` is its gamma."""
    margin = config.beta * (better.mean(better.log_probs) - worse.mean(worse.log_probs))
    return _over_pairs(-log_sigmoid(margin - config.margin), better, worse, counts)


def orpo_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """ORPO: arXiv 2403.07691, equations 6 and 7; `beta` is its lambda."""
    log_odds = [side.mean(side.log_probs) - jnp.log(-jnp.expm1(_below_zero(side))) for side in (better, worse)]
    ratio = _over_pairs(-log_sigmoid(log_odds[0] - log_odds[1]), better, worse, counts)
    return sft_loss(better, worse, counts, config) + config.beta * ratio


def _below_zero(side: Side) -> Array:
    """Mean log-probabilities, kept off 0: a certain answer has infinite odds."""
    return jnp.where(side.there, jnp.minimum(side.mean(side.log_probs), -1e-6), -1.0)


def kto_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """KTO: arXiv 2402.01306, equations 7 and 8."""
    good = config.good_weight * (1 - sigmoid(config.beta * (better.ratio - better.point)))
    bad = config.bad_weight * (1 - sigmoid(config.beta * (worse.point - worse.ratio)))
    total = jnp.sum(jnp.where(better.there, good, 0)) + jnp.sum(jnp.where(worse.there, bad, 0))
    return total / jnp.maximum(counts.better + counts.worse, 1)


def sft_loss(better: Side, worse: Side, counts: AnswerCounts, config: LossConfig) -> Array:
    """Cross-entropy of the better answers, nats per token."""
    return -jnp.sum(jnp.where(better.there, better.log_probs, 0)) / jnp.maximum(counts.better_tokens, 1)


TERMS: dict[str, Term] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "kto": kto_loss,
    "sft": sft_loss,
}


def check_answers(losses: Sequence[LossConfig], texts: Sequence[Documents]) -> None:
    """Raises `UserError` for a loss that compares two answers where a source holds one to each prompt."""
    comparing = ", ".join(loss.name for loss in losses if loss.name not in ("kto", "sft"))
    for text in texts:
        if text.format == "labels" and comparing:
            raise UserError(
                f"source '{text.name}' holds single answers with labels, and of objective.losses {comparing} compare "
                "two answers to a prompt: use kto, or name pairs"
            )


def per_answer(values: Float[Array, "batch seq"], batch: Batch, mesh: jax.sharding.Mesh) -> tuple[Array, Array]:
    """Sums values over the targets that count, by answer: those of the better and of the worse ones [batch, places]."""
    places = batch.tokens.shape[1] // 2 + 1
    values, ids = (
        constrain(array, mesh, ("batch", None)) for array in (jnp.where(batch.loss_mask, values, 0), batch.segment_ids)
    )
    sums = jax.vmap(lambda v, ids: jax.ops.segment_sum(v, ids, 2 * places + 1))(values, ids)
    return sums[:, 1::2], sums[:, 2::2]


def count_answers(batch: Batch, mesh: jax.sharding.Mesh) -> AnswerCounts:
    """Counts the answers of a batch and their tokens."""
    better, worse = per_answer(jnp.ones(batch.tokens.shape, FULL), batch, mesh)
    pairs, *each = (jnp.sum(there, dtype=FULL) for there in ((better > 0) & (worse > 0), better > 0, worse > 0))
    return AnswerCounts(pairs, each[0], each[1], jnp.sum(better), jnp.sum(worse))


def reference_point(
    log_probs: Float[Array, "batch seq"], mismatched: Batch, mesh: jax.sharding.Mesh
) -> Float[Array, ""]:
    """Computes KTO's z: how much likelier than the reference the model finds answers after others' prompts, or 0.

    Source: arXiv 2402.01306, section 4.1; which answers and prompts meet is said in `RecordRows.conversations`.
    """
    assert mismatched.reference is not None
    counts = count_answers(mismatched, mesh)
    gained = jnp.sum(jnp.where(mismatched.loss_mask, log_probs - mismatched.reference, 0))
    return relu(gained / jnp.maximum(counts.better + counts.worse, 1))


def compare_answers(
    log_probs: Float[Array, "batch seq"],
    mean_logits: Float[Array, "batch seq"],
    batch: Batch,
    counts: AnswerCounts,
    losses: list[LossConfig],
    mesh: jax.sharding.Mesh,
    point: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Computes this part of the batch's share of the losses' weighted sum, and of what is reported of the answers.

    Args:
        log_probs: of the targets, nats.
        mean_logits: over the vocabulary.
        batch: judged answers; see `RecordRows` for the numbers of the segments.
        counts: of the whole batch.
        losses: the terms.
        mesh: where the arrays lie.
        point: KTO's z, if it is among the losses.
    """
    assert batch.reference is not None
    ones = jnp.ones_like(log_probs)
    sides = zip(*(per_answer(values, batch, mesh) for values in (log_probs, batch.reference, ones)), strict=True)
    z = 0.0 if point is None else point
    better, worse = (Side(said, reference, tokens, z) for said, reference, tokens in sides)
    loss = sum((term.weight * TERMS[term.name](better, worse, counts, term) for term in losses), jnp.zeros((), FULL))
    rewards = [losses[0].beta * side.ratio for side in (better, worse)]
    logits = per_answer(mean_logits, batch, mesh)
    metrics = {
        f"{name}/{kind}": jnp.sum(values[place]) / jnp.maximum(total, 1)
        for place, kind in enumerate(("chosen", "rejected"))
        for name, values, total in (
            ("rewards", rewards, counts[1 + place]),
            ("logps", (better.log_probs, worse.log_probs), counts[1 + place]),
            ("logits", logits, counts[3 + place]),
        )
    }
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/accuracies"] = _over_pairs(1.0 * (rewards[0] > rewards[1]), better, worse, counts)
    if point is not None:  # a mean over the parts of the batch
        answers = jnp.sum(better.there, dtype=FULL) + jnp.sum(worse.there, dtype=FULL)
        metrics["kl"] = point * answers / jnp.maximum(counts.better + counts.worse, 1)
    return loss, jax.lax.stop_gradient(metrics)
