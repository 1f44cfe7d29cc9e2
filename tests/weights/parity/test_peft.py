"""Adapters in PEFT's format: `peft` loads them onto transformers' model of the same base, which then computes ours."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel

from mixtral_jax.config import ObjectiveConfig
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.sources import DeviceArrays
from mixtral_jax.weights.peft_files import export_peft
from mixtral_jax.weights.released import open_released
from tests.weights.models import import_arrays, runtime, small
from tests.weights.parity.oracle import make_oracle, random_tokens, save
from tests.weights.parity.test_against_transformers import logits_of

CONFIG = small(num_experts=3, num_kv_heads=1, num_heads=4)


@pytest.mark.parametrize("router", [False, True])
def test_peft_computes_what_the_adapters_do(router: bool, tmp_path: Path) -> None:
    save(make_oracle(CONFIG), tmp_path / "hf")
    objective = ObjectiveConfig(name="sft", lora_rank=5, lora_alpha=8.0, lora_router=router)  # more than the experts
    where = runtime(CONFIG)
    architecture = Architecture(CONFIG, where, objective)
    arrays = {**import_arrays(open_released(tmp_path / "hf"), where), "adapters": architecture.init_adapters(0)}
    for number, pair in enumerate(arrays["adapters"].values()):
        pair["b"] = 0.2 * jax.random.normal(jax.random.key(number), pair["b"].shape)
    source = DeviceArrays({"params": arrays["adapters"], "selection_bias": arrays["selection_bias"]})
    export_peft(source, CONFIG, objective, tmp_path / "peft")
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert ("gate" in described["target_modules"]) == router

    tokens = random_tokens(CONFIG, 3, 17)
    base = make_oracle(CONFIG)
    with torch.no_grad():
        before = base(torch.from_numpy(tokens).long()).logits.numpy()
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
        found = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        merged = theirs.merge_and_unload()(torch.from_numpy(tokens).long()).logits.numpy()
    ours = logits_of(architecture, arrays, tokens)
    assert np.abs(ours - before).max() > 0.1
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-4)
    np.testing.assert_allclose(merged, ours, rtol=0, atol=1e-4)
    alone = Architecture(CONFIG, where)
    np.testing.assert_allclose(logits_of(alone, architecture.merge(arrays), tokens), ours, rtol=0, atol=1e-5)
