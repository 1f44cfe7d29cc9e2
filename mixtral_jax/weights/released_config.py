"""config.json and params.json to and from `ModelConfig`: one table of spellings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.weights.names import Format
from mixtral_jax.weights.stored import FileType

# Field of ModelConfig -> its names in config.json, in params.json, and in other copies. Dots go into nested objects.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size", "dim"),
    "d_ff": ("intermediate_size", "hidden_dim"),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_dim": ("head_dim", "head_dim"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "num_experts": ("num_local_experts", "moe.num_experts", "num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe.num_experts_per_tok", "num_experts_per_token"),
    "rope_theta": ("rope_theta", "rope_theta", "rope_parameters.rope_theta"),
    "norm_eps": ("rms_norm_eps", "norm_eps"),
}
_FLOATS = ("rope_theta", "norm_eps")
_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok")
_CONTEXT = ("max_position_embeddings", "max_seq_len")
BOS, EOS = 1, 2  # of every Mistral tokenizer


@dataclass(frozen=True)
class Description:
    """What a released configuration file says."""

    fields: dict[str, Any]  # of ModelConfig; without the experts' when the model is dense
    context: int | None  # tokens
    is_dense: bool


def read_description(file: Path) -> Description:
    """Reads config.json or params.json.

    Raises:
        UserError: unreadable file, missing, contradicting or impossible value, or a feature that Mixtral lacks.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {file} as JSON ({type(error).__name__}): copy it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a JSON object: copy it from the release again")
    _refuse_unknown_features(raw, file)
    found = {field: _value(raw, names, file) for field, names in SPELLINGS.items()}
    if found["num_experts"] is None:
        found = {field: value for field, value in found.items() if field not in _EXPERT_FIELDS}
    if found["rope_theta"] is None and file.name == "params.json":
        # Mistral's own loader: 1e6, except for the first dense model, which is known by its sliding window.
        windowed_dense = "num_experts" not in found and raw.get("sliding_window") is not None
        found["rope_theta"] = 1e4 if windowed_dense else 1e6
    if found["head_dim"] is None:
        del found["head_dim"]
    for field, value in found.items():
        names = " or ".join(dict.fromkeys(SPELLINGS[field]))
        if value is None:
            raise UserError(f"{file} has no {names}: copy it from the release again, or add the value")
        kinds = (int, float) if field in _FLOATS else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
            raise UserError(f"{names} of {file} is {value!r}: it must be a number greater than 0")
    found.setdefault("head_dim", found["d_model"] // found["num_heads"])
    if found["num_heads"] * found["head_dim"] != found["d_model"]:
        raise UserError(
            f"{file} describes {found['num_heads']} heads of {found['head_dim']} and a width of {found['d_model']}: "
            "models whose heads do not fill the width are not supported"
        )
    if found["head_dim"] % 2 or found["num_heads"] % found["num_kv_heads"]:
        raise UserError(
            f"{file} describes {found['num_heads']} heads of {found['head_dim']} over {found['num_kv_heads']} "
            "key/value heads: copy it from the release again"
        )
    if found.get("num_experts_per_tok", 0) > found.get("num_experts", 0):
        raise UserError(
            f"{file} chooses {found['num_experts_per_tok']} of {found['num_experts']} experts: "
            "copy it from the release again"
        )
    fields = {field: float(value) if field in _FLOATS else value for field, value in found.items()}
    return Description(fields, _value(raw, _CONTEXT, file), is_dense="num_experts" not in fields)


def _value(raw: dict[str, Any], names: tuple[str, ...], file: Path) -> Any:
    """Looks up a value under all of its spellings, which must agree."""
    given: dict[str, Any] = {}
    for name in names:
        value: Any = raw
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            given[name] = value
    values = list(given.values())
    if any(value != values[0] for value in values):
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{file} contradicts itself with {both}: remove the wrong one")
    return values[0] if values else None


def _refuse_unknown_features(raw: dict[str, Any], file: Path) -> None:
    """Raises for what would change the model's output; sliding_window is ignored, old copies state it wrongly."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    for name, value, known in (
        ("model_type", raw.get("model_type", "mixtral"), ("mixtral", "mistral")),
        ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", kind, ("default",)),
        ("tie_word_embeddings", raw.get("tie_word_embeddings", False), (False,)),
        ("quantization_config", raw.get("quantization_config"), (None,)),
    ):
        if value not in known:
            raise UserError(f"{file} has {name}={value!r}, which is not a Mixtral: only {known[0]!r} can be imported")


def describe_hf(config: ModelConfig, *, dtype: FileType, context: int, load_balance: float) -> dict[str, Any]:
    """Writes config.json, for transformers before and after version 5.

    Args:
        config: the architecture.
        dtype: of the tensors.
        context: tokens.
        load_balance: our coefficient, of a loss that is 1 at balance; Hugging Face's is top-k there.
    """
    own = {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **own,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": context,
        "sliding_window": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "router_aux_loss_coef": load_balance / config.num_experts_per_tok,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def describe_mistral(config: ModelConfig, layout: Format) -> dict[str, Any]:
    """Writes params.json; the fused format's has the hub's names, which its readers look for."""
    if layout.name == "mistral-fused":
        own = {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
        own["num_experts_per_token"] = config.num_experts_per_tok
        return own
    flat = {names[1]: getattr(config, field) for field, names in SPELLINGS.items() if field not in _EXPERT_FIELDS}
    return {**flat, "moe": {field: getattr(config, field) for field in _EXPERT_FIELDS}}
