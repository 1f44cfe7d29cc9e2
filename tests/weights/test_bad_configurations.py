"""Whatever is wrong with a configuration, one sentence names the key and the file."""

from pathlib import Path
from typing import Any

import pytest

from tests.weights.test_bad_sources import edit_json, hf, refused

__all__ = ["hf"]  # a fixture


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "absent"}, ["no hidden_size or dim"]),
        ({"hidden_size": "4096"}, ["hidden_size or dim", "'4096'", "number greater than 0"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "is 0"]),
        ({"num_hidden_layers": 3}, ["'model.layers.2.input_layernorm.weight' and 18 more"]),
        ({"num_hidden_layers": 1}, ["'model.layers.1.", "not part of"]),
        ({"vocab_size": 65}, ["'lm_head.weight'", "[64, 32]", "[65, 32]", "config.json"]),
        ({"num_experts": 8}, ["num_local_experts=4 and num_experts=8"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ["rope_theta=1000000.0", "=10000.0"]),
        ({"rope_theta": "absent"}, ["no rope_theta or rope_parameters.rope_theta"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, ["rope_type='dynamic'", "default, linear, yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor", "None"]),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, ["rope_scaling.factor", "'4'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "long": 1}}, ["rope_scaling.long=1"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, ["truncate=false"]),
        ({"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": "absent"}, ["rope_theta"]),
        ({"rope_scaling": [4]}, ["rope_scaling", "[4]", "an object"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["rope_parameters.full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"some_new_feature": 3}, ["some_new_feature=3", "remove the key"]),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, ["auto_map"]),
        ({"sliding_window": [4096, None]}, ["has sliding_window=[4096, None]: windows by layer cannot be imported"]),
        ({"sliding_window": 0}, ["sliding_window", "is 0", "whole number greater than 0"]),
        ({"eos_token_id": "</s>"}, ["has eos_token_id='</s>': it must be a token's number, or several"]),
        ({"eos_token_id": [2, -1]}, ["has eos_token_id=[2, -1]"]),
        ({"max_position_embeddings": "32768"}, ["max_position_embeddings", "'32768'", "whole number"]),
        ({"num_attention_heads": [4]}, ["num_attention_heads", "[4]"]),
        ({"num_hidden_layers": 2.0}, ["num_hidden_layers", "2.0", "whole number"]),
        ({"vocab_size": 10**400}, ["vocab_size", "below 2.14748e+09"]),
        ({"rope_theta": 10**400}, ["rope_theta", "below 1e+30"]),
        ({"num_hidden_layers": 10**7}, ["'model.layers.2.input_layernorm.weight' and 189999961 more"]),
        ({"num_local_experts": 10**7}, ["block_sparse_moe.experts.4.w1.weight' and 59999975 more"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True"]),
        ({"model_type": "qwen3_moe"}, ["model_type='qwen3_moe'"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"head_dim": 16}, ["4 heads of 16", "width of 32"]),
        ({"num_key_value_heads": 3}, ["4 heads of 8 over 3"]),
        ({"num_experts_per_tok": 5}, ["chooses 5 of 4"]),
        ({"num_local_experts": "absent", "num_experts_per_tok": "absent"}, ["says that the model is dense"]),
    ],
)
def test_configurations(hf: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_json(hf / "config.json", **changes)
    refused(hf, "config.json", *words)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{,}", "\udcff", '{"dim": ' + "1" * 5000 + "}", "[" * 100_000, '{"a": ' * 100_000]
)
def test_configurations_that_are_no_json(hf: Path, text: str) -> None:
    (hf / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(hf, str(hf / "config.json"))
