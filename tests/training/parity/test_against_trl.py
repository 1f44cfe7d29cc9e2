"""Loss, gradients and metrics of a batch of pairs equal those of TRL's own code, given the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from mixtral_jax.config import LossConfig
from mixtral_jax.data.batch import Batch
from mixtral_jax.training.preferences import compare_answers, count_answers
from tests.tiny import mesh_of

PAIRS, LENGTH, BETA = 5, 12, 0.3
CPU = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")


@pytest.fixture(scope="module")
def example():
    """Log-probabilities of the policy, of the reference, mean logits and which tokens are answers: chosen, rejected."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, LENGTH, size=2 * PAIRS)
    mask = np.arange(LENGTH) >= LENGTH - lengths[:, None]
    policy, reference = -rng.random((2, 2 * PAIRS, LENGTH)).astype(np.float32) * 3
    return policy * mask, reference * mask, rng.standard_normal(policy.shape).astype(np.float32), mask


def theirs(example, losses):
    policy, reference, logits, mask = map(torch.tensor, example)
    policy.requires_grad_()
    outputs = SimpleNamespace(
        log_probs=policy, mean_logits=logits, entropy=torch.zeros_like(policy), is_top1=torch.zeros_like(mask)
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=CPU, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss.name for loss in losses],
        loss_weights=[loss.weight for loss in losses], beta=BETA, label_smoothing=0.0, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    sums = reference.sum(dim=1)
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, LENGTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, LENGTH + 1, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)),
        "ref_chosen_logps": sums[:PAIRS], "ref_rejected_logps": sums[PAIRS:],
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), policy.grad.numpy(), {name: values[0] for name, values in trainer._metrics["train"].items()}


def ours(example, losses, point=None):
    """Each pair in a row of its own, the chosen answer first."""
    policy, reference, logits, mask = (np.concatenate([x[:PAIRS], x[PAIRS:]], axis=1) for x in example)
    ids = np.repeat([[1, 2]], LENGTH, axis=1).repeat(PAIRS, axis=0).astype(np.int32)
    zeros = np.zeros_like(ids)
    batch = jax.tree.map(jnp.asarray, Batch(zeros, zeros, ids, zeros, mask, reference))
    mesh = mesh_of()

    def loss(policy):
        return compare_answers(policy, jnp.asarray(logits), batch, count_answers(batch, mesh), losses, mesh, point)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(policy))
    return float(value), np.concatenate(np.split(np.asarray(grads), 2, axis=1)), metrics


@pytest.mark.parametrize(
    "names", [["sigmoid"], ["hinge"], ["ipo"], ["sigmoid_norm"], ["sft"], ["sigmoid", "sft", "ipo"]], ids="+".join
)
def test_pairs(example, names):
    losses = [LossConfig(name=name, beta=BETA, weight=1.0 + place / 2) for place, name in enumerate(names)]
    value, grads, metrics = theirs(example, losses)
    our_value, our_grads, our_metrics = ours(example, losses)
    assert our_value == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(our_grads, grads * example[3], rtol=1e-4, atol=1e-7)
    assert len(our_metrics) == 8
    for name, found in our_metrics.items():
        assert float(found) == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def sums_and_counts(example):
    """Log-probabilities of answers, whole and by token, with a graph to the tokens'."""
    policy, mask = torch.tensor(example[0], requires_grad=True), torch.tensor(example[3])
    sums = policy.sum(dim=1)
    return policy, sums, sums / mask.sum(dim=1)


def compare(example, name, value, policy, point=None):
    value.backward()
    our_value, our_grads, metrics = ours(example, [LossConfig(name=name, beta=BETA)], point)
    assert our_value == pytest.approx(value.item(), rel=1e-5)
    np.testing.assert_allclose(our_grads, policy.grad.numpy() * example[3], rtol=1e-4, atol=1e-7)
    return metrics


def test_simpo(example):
    policy, _, means = sums_and_counts(example)
    trainer = SimpleNamespace(
        alpha=0.0, beta=BETA, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.0, accelerator=CPU
    )
    compare(example, "simpo", CPOTrainer.cpo_loss(trainer, *means.chunk(2))[0].mean(), policy)


def test_orpo(example):
    policy, sums, means = sums_and_counts(example)
    odds = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=BETA, accelerator=CPU), *means.chunk(2))[0]
    chosen_nats = -sums[:PAIRS].sum() / example[3][:PAIRS].sum()
    compare(example, "orpo", chosen_nats - odds.mean(), policy)


@pytest.mark.parametrize("gain", [2.5, -1.0])
def test_kto(example, gain):
    """Its formula; test_whole_model_against_trl has TRL run the model over mismatched answers, too."""
    policy = torch.tensor(example[0], requires_grad=True)
    outputs = SimpleNamespace(
        log_probs=policy, mean_logits=torch.tensor(example[2]), entropy=torch.zeros_like(policy),
        is_top1=torch.zeros_like(policy, dtype=torch.bool),
    )  # fmt: skip
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=CPU, aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=True, _compute_kl_logps=lambda *_: torch.full((2 * PAIRS,), gain), loss_type="kto", beta=BETA,
        desirable_weight=1.0, undesirable_weight=1.0, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, LENGTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, LENGTH + 1, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(torch.tensor(example[3]).long(), (1, 0)),
        "label": torch.arange(2 * PAIRS) < PAIRS,
        "ref_logps": torch.tensor(example[1]).sum(dim=1), "ref_KL_logps": torch.zeros(2 * PAIRS),
    }  # fmt: skip
    value = KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    metrics = compare(example, "kto", value, policy, jnp.float32(max(gain, 0)))
    assert float(metrics["kl"]) == trainer._metrics["train"]["kl"][0]
