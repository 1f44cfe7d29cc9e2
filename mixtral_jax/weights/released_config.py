"""config.json and params.json to and from `ModelConfig`: one table of spellings."""

import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_jax.config import ModelConfig, RopeScalingConfig, UserError
from mixtral_jax.weights.names import Format
from mixtral_jax.weights.released_keys import number, read_object, refuse_unknown
from mixtral_jax.weights.rope import describe_rope, read_scaling
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
    "rope_theta": ("rope_theta", "rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"),
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
    context: int | None  # tokens up to which the model here computes what the release does
    is_dense: bool
    rope_scaling: RopeScalingConfig
    window: int | None = None  # tokens, where that is what bounds the context
    eos_token_id: int | list[int] | None = None  # what ends a generated text


def read_description(file: Path) -> Description:
    """Reads config.json or params.json.

    Raises:
        UserError: unreadable file, missing, contradicting or impossible value, or a key that is not known.
    """
    raw = read_object(file)
    ours = {name.split(".")[0] for names in SPELLINGS.values() for name in names}
    refuse_unknown(raw, {*ours, *_CONTEXT, "sliding_window", "rope_scaling", "moe", "eos_token_id"}, file)
    moe = raw.get("moe") or {}
    if not isinstance(moe, dict):
        raise UserError(f"moe of {file} is {reprlib.repr(moe)}: it must be an object, or null")
    refuse_unknown(moe, set(_EXPERT_FIELDS), file, "moe.")
    found = {field: _value(raw, names, file) for field, names in SPELLINGS.items()}
    if found["num_experts"] is None:
        found = {field: value for field, value in found.items() if field not in _EXPERT_FIELDS}
    window = raw.get("sliding_window")
    if found["rope_theta"] is None and file.name == "params.json":
        # Mistral's own loader: 1e6, except for the first dense model, which is known by its sliding window.
        found["rope_theta"] = 1e4 if "num_experts" not in found and window is not None else 1e6
    if found["head_dim"] is None:
        del found["head_dim"]
    for field, value in found.items():
        names = " or ".join(dict.fromkeys(SPELLINGS[field]))
        if value is None:
            raise UserError(f"{file} has no {names}: copy it from the release again, or add the value")
        number(value, names, file, whole=field not in _FLOATS)
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
    context = _value(raw, _CONTEXT, file)
    if context is not None:
        number(context, " or ".join(_CONTEXT), file, whole=True)
    scaling = read_scaling(raw, context, file)
    if isinstance(window, list):
        raise UserError(f"{file} has sliding_window={reprlib.repr(window)}: windows by layer cannot be imported")
    if window is not None:
        # The first upload writes the number as a string.
        window = int(window) if isinstance(window, str) and re.fullmatch("[0-9]{1,9}", window) else window
        number(window, "sliding_window", file, whole=True)
    # A window is not computed here; it changes nothing in rows that it covers whole.
    bounded = window is not None and (context is None or window < context)
    return Description(
        fields,
        window if bounded else context,
        "num_experts" not in fields,
        scaling,
        window if bounded else None,
        _eos(raw.get("eos_token_id"), file),
    )


def _eos(value: Any, file: Path) -> int | list[int] | None:
    for entry in value if isinstance(value, list) else [value]:
        if value is not None and (type(entry) is not int or not 0 <= entry < 2**31):
            raise UserError(f"{file} has eos_token_id={reprlib.repr(value)}: it must be a token's number, or several")
    return value


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
        both = " and ".join(f"{name}={reprlib.repr(value)}" for name, value in given.items())
        raise UserError(f"{file} contradicts itself with {both}: remove the wrong one")
    return values[0] if values else None


def describe_hf(
    config: ModelConfig,
    *,
    dtype: FileType,
    context: int,
    load_balance: float,
    bos: int = BOS,
    eos: int | list[int] = EOS,
) -> dict[str, Any]:
    """Writes config.json, for transformers before and after version 5.

    Args:
        config: the architecture.
        dtype: of the tensors.
        context: tokens.
        load_balance: our coefficient, of a loss that is 1 at balance; Hugging Face's is top-k there.
        bos: the token that begins a text.
        eos: the token, or those, that end one.
    """
    own = {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **own,
        **describe_rope(config),
        "max_position_embeddings": context,
        "sliding_window": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "router_aux_loss_coef": load_balance / config.num_experts_per_tok,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
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
