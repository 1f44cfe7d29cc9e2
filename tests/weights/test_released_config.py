"""config.json and params.json: every spelling in, both out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

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
    assert read(tmp_path, hf) == Description(DECIDED, 32768, is_dense=False)
    newer = {key: value for key, value in hf.items() if key not in ("rope_theta", "num_local_experts")}
    newer |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "num_experts": 4, "head_dim": None}
    assert read(tmp_path, newer).fields == DECIDED
    assert read(tmp_path, {**hf, "sliding_window": 4096, "rope_scaling": None}).fields == DECIDED
    assert read(tmp_path, {**params, "rope_theta": 5e5}, "params.json").fields == DECIDED
    first = first_upload_json(CONFIG)
    assert isinstance(first["sliding_window"], str)
    assert read(tmp_path, first, "params.json").fields == DECIDED


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
    assert read(tmp_path, hf) == Description(DECIDED, 777, is_dense=False)
    assert hf["router_aux_loss_coef"] == 0.25  # ours is 1 at balance, theirs top-k
    params = describe_mistral(CONFIG, FORMATS[name])
    assert read(tmp_path, params, "params.json").fields == DECIDED


def test_the_spellings_are_what_a_checkpoint_decides() -> None:
    no_default = {entry.name for entry in dataclasses.fields(CONFIG) if entry.default == "???"}
    assert set(SPELLINGS) == no_default
