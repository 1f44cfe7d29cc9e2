"""config.json and params.json: every spelling in, both out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.config import RopeScalingConfig, UserError
from mixtral_jax.weights.names import FORMATS
from mixtral_jax.weights.released_config import SPELLINGS, Description, describe_hf, describe_mistral, read_description
from tests.weights.models import small
from tests.weights.synthetic import config_json, first_upload_json, params_json

CONFIG = small(rope_theta=5e5)
DECIDED = {field: getattr(CONFIG, field) for field in SPELLINGS}


def read(tmp_path: Path, content: dict[str, Any], name: str = "config.json") -> Description:
    (tmp_path / name).write_text(json.dumps(content))
    return read_description(tmp_path / name)


def test_every_spelling(tmp_path: Path) -> None:
    hf, params = config_json(CONFIG), params_json(CONFIG)
    assert read(tmp_path, hf) == Description(DECIDED, 32768, False, RopeScalingConfig())
    newer = {key: value for key, value in hf.items() if key not in ("rope_theta", "num_local_experts")}
    newer |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "num_experts": 4, "head_dim": None}
    assert read(tmp_path, newer).fields == DECIDED
    assert read(tmp_path, {**hf, "sliding_window": 4096, "rope_scaling": None}).fields == DECIDED
    assert read(tmp_path, {**params, "rope_theta": 5e5}, "params.json").fields == DECIDED
    first = first_upload_json(CONFIG)
    assert isinstance(first["sliding_window"], str)
    assert read(tmp_path, first, "params.json").fields == DECIDED


@pytest.mark.parametrize(
    ("window", "context", "right_up_to", "bounded"),
    [(None, 32768, 32768, False), (4096, 32768, 4096, True), (32768, 32768, 32768, False), (4096, None, 4096, True),
     (65536, 32768, 32768, False), (None, None, None, False)],
)  # fmt: skip
def test_a_window_bounds_what_the_model_is_right_for(
    tmp_path: Path, window: int | None, context: int | None, right_up_to: int | None, bounded: bool
) -> None:
    content = {**config_json(CONFIG), "sliding_window": window, "max_position_embeddings": context}
    found = read(tmp_path, content)
    assert (found.context, found.window) == (right_up_to, window if bounded else None)


def test_what_changes_nothing_is_let_through(tmp_path: Path) -> None:
    extra = {
        "attention_bias": False, "attention_dropout": 0.1, "layer_types": ["full_attention"] * 2, "use_cache": True,
        "eos_token_id": [2, 32000], "_name_or_path": "me/mine", "unknown": None, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    assert read(tmp_path, {**config_json(CONFIG), **extra}).fields == DECIDED
    extra = {"activation": "silu", "tied_embeddings": False, "max_batch_size": 4, "quantization": None}
    assert read(tmp_path, {**params_json(CONFIG), "rope_theta": 5e5, **extra}, "params.json").fields == DECIDED


@pytest.mark.parametrize(
    "changes",
    [{"yarn": {"factor": 4}}, {"llama_4_scaling": {"beta": 0.1}}, {"tied_embeddings": True}, {"activation": "gelu"},
     {"quantization": {"qformat_weight": "fp8_e4m3"}}, {"sliding_window": [4096, None]}, {"use_biases": True},
     {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}}, {"moe": [4]},
     {"lora": {"rank": 8}}, {"vision_encoder": {"hidden_size": 8}}, {"max_seq_len": "32768"}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, {**params_json(CONFIG), **changes}, "params.json")
    assert next(iter(changes)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_only_config_json_has_a_place_for_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, {**params_json(CONFIG), "yarn": {"factor": 4}}, "params.json")
    assert str(caught.value) == (
        f"{tmp_path}/params.json has yarn={{'factor': 4}}, which is not a Mixtral: it is read from config.json, so "
        "import the release's files in Hugging Face's format"
    )


def test_rope_theta_may_be_absent_from_params_json(tmp_path: Path) -> None:
    params = params_json(CONFIG)
    assert read(tmp_path, params, "params.json").fields["rope_theta"] == 1e6
    assert read(tmp_path, {**params, "sliding_window": 4096}, "params.json").fields["rope_theta"] == 1e6
    del params["moe"]
    assert read(tmp_path, params, "params.json").fields["rope_theta"] == 1e6
    first_dense = read(tmp_path, {**params, "sliding_window": 4096}, "params.json")
    assert first_dense.is_dense
    assert first_dense.fields["rope_theta"] == 1e4


@pytest.mark.parametrize("name", ["mistral", "mistral-fused"])
def test_what_is_written_is_read_back(tmp_path: Path, name: Any) -> None:
    hf = describe_hf(CONFIG, dtype="bfloat16", context=777, load_balance=0.5)
    assert read(tmp_path, hf) == Description(DECIDED, 777, False, RopeScalingConfig(), eos_token_id=2)
    assert hf["router_aux_loss_coef"] == 0.25  # ours is 1 at balance, theirs top-k
    params = describe_mistral(CONFIG, FORMATS[name])
    assert read(tmp_path, params, "params.json").fields == DECIDED


def test_the_spellings_are_what_a_checkpoint_decides() -> None:
    no_default = {entry.name for entry in dataclasses.fields(CONFIG) if entry.default == "???"}
    assert set(SPELLINGS) == no_default
