"""Slowed rotary frequencies: what transformers computes from a config.json is what an import of it computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtral_jax.weights.exporting import About, export_weights
from tests.weights.models import small
from tests.weights.parity.oracle import make_oracle, random_tokens, save
from tests.weights.parity.test_against_transformers import ONE_DEVICE, imported, logits_of

CONFIG = small(d_model=64, num_heads=2, num_kv_heads=1, head_dim=32)  # sixteen frequencies, of which YaRN bends some
LENGTH = 96
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, old key": {"type": "linear", "factor": 2},
    "yarn": YARN,
    "yarn, theta inside": {**YARN, "rope_theta": 1e6},
    "yarn, betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn, attention": {**YARN, "attention_factor": 0.7},
    "yarn, mscale": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.8},
    "yarn, one mscale": {**YARN, "mscale": 0.5},
    "yarn, original context from the config": {"rope_type": "yarn", "factor": 4.0},
    "default": {"rope_type": "default"},
}


def described(directory: Path, where: str, scaling: dict[str, Any]) -> Path:
    """A checkpoint of plain rotary embedding whose config.json then says otherwise."""
    save(make_oracle(CONFIG), directory)
    file = directory / "config.json"
    content = json.loads(file.read_text())
    if where == "rope_scaling":  # beside what transformers 5 and our export write, as a model card advises
        content |= {"rope_theta": CONFIG.rope_theta, "rope_scaling": scaling, "max_position_embeddings": 64}
        assert content["rope_parameters"]["rope_type"] == "default"
    else:
        content |= {"rope_parameters": {"rope_theta": CONFIG.rope_theta, **scaling}, "max_position_embeddings": 64}
    file.write_text(json.dumps(content))
    return directory


def expected(directory: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", SCALINGS)
def test_logits(name: str, where: str, tmp_path: Path) -> None:
    directory = described(tmp_path / "hf", where, SCALINGS[name])
    tokens = random_tokens(CONFIG, 2, LENGTH)
    theirs = expected(directory, tokens)
    architecture, arrays = imported(directory, ONE_DEVICE, 2, LENGTH)
    ours = logits_of(architecture, arrays, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    export_weights(arrays, architecture.config, tmp_path / "out", "hf", About(context=512, load_balance=0.02))
    np.testing.assert_allclose(expected(tmp_path / "out", tokens), theirs, atol=1e-4, rtol=0)
    assert imported(tmp_path / "out", ONE_DEVICE, 2, LENGTH)[0].config == architecture.config


def test_scalings_matter(tmp_path: Path) -> None:
    """Taken for plain rotary embedding, as they once were, YaRN and linear scaling give another model."""
    tokens = random_tokens(CONFIG, 2, LENGTH)
    plain = expected(described(tmp_path / "plain", "rope_parameters", SCALINGS["default"]), tokens).argmax(-1)
    for name in ("yarn", "linear"):
        scaled = expected(described(tmp_path / name, "rope_parameters", SCALINGS[name]), tokens).argmax(-1)
        assert (plain == scaled).mean() < 0.6
