"""Loss and gradients of a model on a batch of judged answers equal those of TRL's trainer on its export."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import MixtralForCausalLM

from benchmarks.preferences import documents_of, make_pairs, trl_records, trl_trainer
from mixtral_jax.config_loading import replace
from mixtral_jax.data.record_rows import RecordRows
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.training.losses import compute_losses, count
from mixtral_jax.training.step import Trainable
from mixtral_jax.weights.exporting import About, export_weights
from tests.tiny import mesh_of, tiny_config

BETA, LOSSES = 0.3, {"pairs": ["sigmoid", "ipo"], "labels": ["kto"]}


def export(arrays, config, directory):
    export_weights(arrays, config.model, directory, "hf-fused", About(config.data.seq_len, load_balance=0.0))
    (file,) = Path(directory).glob("*.safetensors")
    return load_file(file)


def theirs(directory, reference, records, **settings):
    """TRL's loss and gradients by name; the reference is another model."""
    model, other = (MixtralForCausalLM.from_pretrained(where, dtype=torch.float32) for where in (directory, reference))
    trainer, inputs = trl_trainer(model, records, directory, other, beta=BETA, gradient_checkpointing=False, **settings)
    loss = trainer.compute_loss(model.train(), inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), {name: weight.grad.numpy() for name, weight in model.named_parameters()}, metrics


def labelled(pairs, documents):
    """Every answer of the pairs as a record with a label; for TRL with the answer of the record before."""
    lengths = [len(prompt) + len(answer) for prompt, *answers in pairs for answer in answers]
    offsets = np.append(0, np.cumsum(lengths))
    records = [
        {"prompt_ids": prompt, "completion_ids": answer, "label": place == 0}
        for prompt, *answers in pairs
        for place, answer in enumerate(answers)
    ]
    # The rows decide about the order.
    documents = dataclasses.replace(
        documents, format="labels", starts=offsets[:-1], offsets=offsets, byte_counts=np.zeros(len(records), np.int64)
    )
    rows = RecordRows(documents, 128, mismatched=True)
    placed = [index[0] for row in range(rows.count) for index in rows.conversations(row)]
    records = [records[int(np.searchsorted(offsets, place))] for place in placed]
    for record, before in zip(records, [records[-1], *records], strict=False):
        record["KL_completion_ids"] = before["completion_ids"]
    return rows, records


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients(tmp_path, kind):
    losses = ", ".join(f"{{name: {name}, beta: {BETA}}}" for name in LOSSES[kind])
    config = tiny_config(
        "data.seq_len=128", "losses.load_balance=0", "losses.router_z=0",
        f"objective={{name: preference, losses: [{losses}]}}",
    )  # fmt: skip
    pairs = [tuple(tokens[:20] for tokens in pair) for pair in make_pairs(config.model.vocab_size, 3)]
    documents = documents_of(pairs)
    if kind == "pairs":
        rows, records, asked = RecordRows(documents, 128), trl_records(pairs), {"loss_type": LOSSES[kind]}
    else:
        rows, records = labelled(pairs, documents)
        asked = {"undesirable_weight": 1.0}
    config = replace(config, train={"batch_size": rows.count})
    architecture = Architecture(config.model, make_runtime(config, mesh_of()))
    step = Trainable(architecture, config)
    policy, reference = (architecture.init(seed) for seed in (1, 0))
    score = make_scorer(architecture)(reference)
    batch = rows.pack(np.arange(rows.count))
    if batch.mismatched:
        assert rows.count > 1, "answers go from one row to another"
        nats = score(batch.mismatched).nats
        batch = dataclasses.replace(batch, mismatched=dataclasses.replace(batch.mismatched, reference=-nats))
    nats = score(dataclasses.replace(batch, mismatched=None)).nats
    placed = step.put(dataclasses.replace(batch, reference=-nats))
    counts = count(placed, architecture.runtime.mesh)

    def loss(params):
        model = architecture.bind({**policy, "params": params})
        losses = compute_losses(model, placed, counts, None, config.losses, config.objective)[0]
        return losses.total, losses.answers

    (value, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(policy["params"])
    export(policy, config, tmp_path / "policy")
    export(reference, config, tmp_path / "reference")
    our_grads = export({**policy, "params": grads}, config, tmp_path / "grads")

    expected, their_grads, metrics = theirs(tmp_path / "policy", tmp_path / "reference", records, **asked)
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert our_grads.keys() == their_grads.keys()
    for name, expected in their_grads.items():
        difference = np.linalg.norm(our_grads[name] - expected) / np.linalg.norm(expected)
        assert difference < 1e-4, name
    assert ("kl" in found) == ("kl" in metrics) == (kind == "labels")
    for name in found.keys() & metrics.keys():
        assert float(found[name]) == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    assert found.get("kl", 1) > 0
