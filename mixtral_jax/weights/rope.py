"""The rotary embedding in config.json, as transformers reads it: plain, linear or YaRN."""

import math
from pathlib import Path
from typing import Any

from mixtral_jax.config import ModelConfig, RopeScalingConfig, UserError
from mixtral_jax.model.rope_scaling import attention_factor
from mixtral_jax.weights.released_keys import number, refuse_unknown

# What each kind reads beside its own name and `rope_theta`.
_READ = {
    "default": set[str](),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
             "mscale_all_dim", "truncate"},
}  # fmt: skip


def read_scaling(raw: dict[str, Any], context: int | None, file: Path) -> RopeScalingConfig:
    """Reads `rope_scaling`, or else `rope_parameters`.

    Args:
        raw: the whole of config.json.
        context: `max_position_embeddings`, tokens.
        file: for messages.

    Raises:
        UserError: another kind, a key that the kind does not have, or a value that cannot be.
    """
    section = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(section) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{section} of {file} is {rope!r:.60}: it must be an object, or null")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in _READ:
        raise UserError(f"{file} has rope_type={kind!r:.60}: only {', '.join(_READ)} can be imported")
    refuse_unknown(rope, {"rope_type", "type", "rope_theta", *_READ[kind]}, file, f"{section}.")
    if section == "rope_scaling" and raw.get("rope_theta") is None and rope.get("rope_theta") is None:
        raise UserError(f"{file} has rope_scaling but no rope_theta beside it: add the value, as transformers reads it")
    if kind == "default":
        return RopeScalingConfig()

    def value(name: str, default: float | None = None) -> float:
        found = default if rope.get(name) is None else rope[name]
        return float(number(found, f"{section}.{name}", file, whole=False))

    if kind == "linear":
        return RopeScalingConfig("linear", factor=value("factor"))
    if not rope.get("truncate", True):
        raise UserError(f"{file} has {section}.truncate=false: only true can be imported")
    original = rope.get("original_max_position_embeddings") or context
    original = number(original, f"{section}.original_max_position_embeddings", file, whole=True)
    factor = value("factor", context / original if context else None)
    if rope.get("attention_factor") is not None:
        attention = value("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _mscale(factor, value("mscale")) / _mscale(factor, value("mscale_all_dim"))
    else:
        attention = _mscale(factor, 1.0)
    return RopeScalingConfig("yarn", factor, original, attention, value("beta_fast", 32.0), value("beta_slow", 1.0))


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def describe_rope(model: ModelConfig) -> dict[str, Any]:
    """Writes the keys of config.json, for transformers before and after version 5."""
    scaling = model.rope_scaling
    theta = {"rope_theta": model.rope_theta}
    if scaling.kind == "none":
        return {**theta, "rope_parameters": {"rope_type": "default", **theta}}
    values: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        values |= {
            "original_max_position_embeddings": scaling.original_context,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": attention_factor(scaling),
        }
    return {**theta, "rope_parameters": {**values, **theta}, "rope_scaling": values}
