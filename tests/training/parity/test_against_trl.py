"""Loss, gradients and metrics of a batch of pairs equal those of TRL's own code, given the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from mixtral_jax.config import LossConfig
from mixtral_jax.data.batch import Batch
from mixtral_jax.training.preferences import compare_answers, count_answers
from tests.tiny import mesh_of

PAIRS, LENGTH, BETA = 5, 12, 0.3


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
    whole = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=whole, aux_loss_enabled=False, ld_alpha=None,
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


def ours(example, losses):
    """Each pair in a row of its own, the chosen answer first."""
    policy, reference, logits, mask = (np.concatenate([x[:PAIRS], x[PAIRS:]], axis=1) for x in example)
    ids = np.repeat([[1, 2]], LENGTH, axis=1).repeat(PAIRS, axis=0).astype(np.int32)
    zeros = np.zeros_like(ids)
    batch = jax.tree.map(jnp.asarray, Batch(zeros, zeros, ids, zeros, mask, reference))
    mesh = mesh_of()

    def loss(policy):
        return compare_answers(policy, jnp.asarray(logits), batch, count_answers(batch, mesh), losses, mesh)

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
