"""Loss and gradients of a model on a batch of pairs equal those of TRL's trainer on its export."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import MixtralForCausalLM

from benchmarks.preferences import make_pairs, rows_of, trl_trainer
from mixtral_jax.config_loading import replace
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.training.losses import compute_losses, count
from mixtral_jax.training.step import Trainable
from mixtral_jax.weights.exporting import export_weights
from tests.tiny import mesh_of, tiny_config

BETA, LOSSES = 0.3, ["sigmoid", "ipo"]


def export(arrays, config, directory):
    context = config.data.seq_len
    export_weights(arrays, config.model, directory, "hf-fused", context=context, load_balance=0.0)
    (file,) = Path(directory).glob("*.safetensors")
    return load_file(file)


def theirs(directory, reference, pairs):
    """TRL's loss and gradients by name; the reference is another model."""
    model, other = (MixtralForCausalLM.from_pretrained(where, dtype=torch.float32) for where in (directory, reference))
    trainer, inputs = trl_trainer(
        model, pairs, directory, other, beta=BETA, loss_type=LOSSES, gradient_checkpointing=False
    )
    loss = trainer.compute_loss(model.train(), inputs)
    loss.backward()
    return loss.item(), {name: weight.grad.numpy() for name, weight in model.named_parameters()}


def test_loss_and_gradients(tmp_path):
    losses = ", ".join(f"{{name: {name}, beta: {BETA}}}" for name in LOSSES)
    config = tiny_config(
        "data.seq_len=512", "losses.load_balance=0", "losses.router_z=0",
        f"objective={{name: preference, losses: [{losses}]}}",
    )  # fmt: skip
    pairs = [tuple(tokens[:20] for tokens in pair) for pair in make_pairs(config.model.vocab_size, 3)]
    rows = rows_of(pairs, config.data.seq_len)
    config = replace(config, train={"batch_size": rows.count})
    architecture = Architecture(config.model, make_runtime(config, mesh_of()))
    step = Trainable(architecture, config)
    policy, reference = (architecture.init(seed) for seed in (0, 1))
    batch = rows.pack(np.arange(rows.count))
    placed = step.put(dataclasses.replace(batch, reference=-make_scorer(architecture)(reference)(batch).nats))
    counts = count(placed, architecture.runtime.mesh)

    def loss(params):
        model = architecture.bind({**policy, "params": params})
        return compute_losses(model, placed, counts, None, config.losses, config.objective)[0].total

    value, grads = jax.jit(jax.value_and_grad(loss))(policy["params"])
    export(policy, config, tmp_path / "policy")
    export(reference, config, tmp_path / "reference")
    our_grads = export({**policy, "params": grads}, config, tmp_path / "grads")

    expected, their_grads = theirs(tmp_path / "policy", tmp_path / "reference", pairs)
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert our_grads.keys() == their_grads.keys()
    for name, expected in their_grads.items():
        difference = np.linalg.norm(our_grads[name] - expected) / np.linalg.norm(expected)
        assert difference < 1e-4, name
