"""Losses on answers against formulas in float64; gradients of the production path against an oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit

from mixtral_jax.config import LossConfig, ObjectiveConfig
from mixtral_jax.config_loading import replace
from mixtral_jax.data.batch import Batch
from mixtral_jax.training.losses import compute_losses, count
from mixtral_jax.training.preferences import TERMS, AnswerCounts, Side
from mixtral_jax.training.step import Trainable
from tests.tiny import mesh_of, tiny_architecture, tiny_config

SETTINGS = {"beta": 0.3, "label_smoothing": 0.1, "margin": 0.7, "good_weight": 1.5, "bad_weight": 0.5}
BETTER = np.array([[-3.0, -9.5, -1.2, 0.0], [-4.4, -2.0, 0.0, 0.0]])  # sums of log-probabilities; 0: no answer
WORSE = np.array([[-5.0, -4.0, 0.0, -2.5], [-3.9, -8.0, 0.0, 0.0]])
BETTER_REF, WORSE_REF = BETTER * 1.3 + 0.4 * (BETTER < 0), WORSE * 0.8 - 0.2 * (WORSE < 0)
POINT = 0.8  # of KTO
BETTER_TOKENS = np.array([[3, 5, 2, 0], [4, 1, 0, 0]])
WORSE_TOKENS = np.array([[2, 4, 0, 3], [6, 5, 0, 0]])
COUNTS = AnswerCounts(*(jnp.float32(n) for n in (4, 5, 5, BETTER_TOKENS.sum(), WORSE_TOKENS.sum())))


def by_hand(name: str) -> float:
    """One loss of the answers above, in float64 and loops."""
    beta, values = SETTINGS["beta"], []
    ratios: dict[str, list[float]] = {"better": [], "worse": []}
    for b, w, b_ref, w_ref, b_n, w_n in zip(
        *(a.ravel() for a in (BETTER, WORSE, BETTER_REF, WORSE_REF, BETTER_TOKENS, WORSE_TOKENS)), strict=True
    ):
        ratios["better"] += [b - b_ref] if b_n else []
        ratios["worse"] += [w - w_ref] if w_n else []
        if not (b_n and w_n):
            continue
        delta = (b - b_ref) - (w - w_ref)
        mean_delta = (b - b_ref) / b_n - (w - w_ref) / w_n
        odds = [p - np.log(1 - np.exp(p)) for p in (b / b_n, w / w_n)]
        values.append(
            {
                "sigmoid": -0.9 * log_expit(beta * delta) - 0.1 * log_expit(-beta * delta),
                "hinge": max(0, 1 - beta * delta),
                "ipo": (mean_delta - 1 / (2 * beta)) ** 2,
                "sigmoid_norm": -log_expit(beta * mean_delta),
                "simpo": -log_expit(beta * (b / b_n - w / w_n) - 0.7),
                "orpo": -beta * log_expit(odds[0] - odds[1]),
            }.get(name, 0)
        )
    nats = -BETTER.sum() / BETTER_TOKENS.sum()
    if name == "sft":
        return nats
    if name == "kto":
        good = [1.5 * (1 - expit(beta * (r - POINT))) for r in ratios["better"]]
        bad = [0.5 * (1 - expit(beta * (POINT - r))) for r in ratios["worse"]]
        return np.mean(good + bad)
    return np.mean(values) + (nats if name == "orpo" else 0)


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_is_its_formula(name):
    sides = [
        Side(*(jnp.asarray(a, jnp.float32) for a in arrays), POINT)
        for arrays in ((BETTER, BETTER_REF, BETTER_TOKENS), (WORSE, WORSE_REF, WORSE_TOKENS))
    ]
    config = LossConfig(name=name, **SETTINGS)
    assert TERMS[name](*sides, COUNTS, config) == pytest.approx(by_hand(name), rel=1e-5)
    grads = jax.grad(lambda log_probs: TERMS[name](sides[0]._replace(log_probs=log_probs), sides[1], COUNTS, config))(
        sides[0].log_probs
    )
    assert np.isfinite(grads).all()
    assert not grads[BETTER_TOKENS == 0].any()


def judged_batch(rows: int = 4, seq: int = 32, vocab: int = 64) -> Batch:
    """Rows of pairs of random conversations, a pair without its better answer in each, and padding."""
    rng = np.random.default_rng(3)
    tokens, targets, ids, positions = np.zeros((4, rows, seq), np.int32)
    mask, reference = np.zeros((rows, seq), bool), np.zeros((rows, seq), np.float32)
    for row in range(rows):
        start = 0
        for segment, length in ((1, 6), (2, 5 + row), (4, 4), (5, 3), (6, 7)):
            text = rng.integers(vocab, size=length + 1)
            here = slice(start, start + length)
            tokens[row, here], targets[row, here], ids[row, here] = text[:-1], text[1:], segment
            positions[row, here] = np.arange(length)
            mask[row, start + 2 : start + length] = True
            reference[row, here] = -4 - rng.random(length)
            start += length
    batch = Batch(tokens, targets, ids, positions, mask, reference)
    return dataclasses.replace(batch, mismatched=dataclasses.replace(batch, tokens=targets, reference=reference * 1.1))


TERMS_SUMMED = [
    LossConfig(name="sigmoid", beta=0.5), LossConfig(name="sft", weight=0.3), LossConfig(name="orpo", weight=0.7),
    LossConfig(name="kto", weight=2.0), LossConfig(name="ipo", weight=0.01),
]  # fmt: skip


def oracle(architecture, arrays, batch, losses):
    """The loss by whole logits and one answer after the other; differentiable."""

    def said(batch):
        x, _ = architecture.bind(arrays)(*map(jnp.asarray, (batch.tokens, batch.segment_ids, batch.positions)))
        logits = jax.nn.log_softmax(x @ architecture.bind(arrays).head())
        return jnp.take_along_axis(logits, jnp.asarray(batch.targets)[..., None], -1)[..., 0]

    log_probs, other = said(batch), batch.mismatched
    gains = jnp.where(other.loss_mask, said(other) - other.reference, 0)
    answers = sum(len(set(ids[mask])) for ids, mask in zip(other.segment_ids, other.loss_mask, strict=True))
    point = jnp.maximum(0, jax.lax.stop_gradient(gains.sum()) / answers)
    columns = {"better": [], "worse": []}
    for row in range(len(batch.tokens)):
        for unit in range(3):
            for side, segment in (("better", 2 * unit + 1), ("worse", 2 * unit + 2)):
                here = np.flatnonzero((batch.segment_ids[row] == segment) & batch.loss_mask[row])
                columns[side].append(
                    (jnp.sum(log_probs[row, here]), float(batch.reference[row, here].sum()), float(len(here)))
                )
    stacked = ([jnp.stack([jnp.asarray(v) for v in column])[None] for column in zip(*columns[side], strict=True)]
               for side in columns)  # fmt: skip
    sides = [Side(*each, point) for each in stacked]
    there = [side.tokens > 0 for side in sides]
    counts = AnswerCounts(
        jnp.sum(there[0] & there[1]), jnp.sum(there[0]), jnp.sum(there[1]), *(jnp.sum(side.tokens) for side in sides)
    )
    return sum(term.weight * TERMS[term.name](*sides, counts, term) for term in losses), sides


def test_gradients_of_the_chunked_packed_path_equal_the_oracle_s():
    config = replace(tiny_config("kernels.loss_chunk=7"), losses={"load_balance": 0.0, "router_z": 0.0})
    architecture, batch = tiny_architecture(config), judged_batch()
    arrays, placed = architecture.init(0), jax.tree.map(jnp.asarray, batch)
    objective = ObjectiveConfig(name="preference", losses=TERMS_SUMMED)

    def ours(params):
        model = architecture.bind({**arrays, "params": params})
        counts = count(placed, architecture.runtime.mesh)
        return compute_losses(model, placed, counts, None, config.losses, objective)[0].total

    value, grads = jax.jit(jax.value_and_grad(ours))(arrays["params"])
    expected, expected_grads = jax.jit(
        jax.value_and_grad(lambda params: oracle(architecture, {**arrays, "params": params}, batch, TERMS_SUMMED)[0])
    )(arrays["params"])
    assert value == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * max(1e-3, float(np.abs(other).max())))


def test_metrics_have_trl_s_names_and_meanings_on_a_mesh():
    config, batch = tiny_config(), judged_batch()
    objective = ObjectiveConfig(name="preference", losses=TERMS_SUMMED)
    architecture = tiny_architecture(config, mesh_of(data=2, context=2, tensor=2))
    trainable = Trainable(architecture, replace(config, objective=vars(objective), train={"batch_size": 4}))
    found = trainable.judge(architecture.init(0), [batch])
    architecture = tiny_architecture(config)
    loss, (better, worse) = oracle(architecture, architecture.init(0), batch, TERMS_SUMMED)
    rewards = [np.asarray(0.5 * side.ratio) for side in (better, worse)]
    there = [np.asarray(side.there) for side in (better, worse)]
    both = there[0] & there[1]
    expected = {
        "loss": loss,
        "cross_entropy": -np.sum(better.log_probs) / np.sum(better.tokens),
        "rewards/chosen": rewards[0][there[0]].mean(),
        "rewards/rejected": rewards[1][there[1]].mean(),
        "rewards/margins": rewards[0][there[0]].mean() - rewards[1][there[1]].mean(),
        "rewards/accuracies": (rewards[0] > rewards[1])[both].mean(),
        "logps/chosen": np.asarray(better.log_probs)[there[0]].mean(),
        "logps/rejected": np.asarray(worse.log_probs)[there[1]].mean(),
        "kl": better.point,
    }
    assert better.point > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=2e-4), name
    assert set(found) - set(expected) == {"logits/chosen", "logits/rejected"}
