"""Formulas: parameters, work per token and model FLOP utilisation, from the architecture alone."""

from typing import NamedTuple

from mixtral_jax.config import ModelConfig
from mixtral_jax.hardware import PeakFlops


class ParameterCounts(NamedTuple):
    """Parameters of a model."""

    total: int
    active: int  # those that take part in one token: all but the experts that its router does not choose


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Counts parameters by formula, without making any.

    A layer holds two norms (d_model each), the query and output projections (d_model * num_heads * head_dim each), the
    key and value projections (d_model * num_kv_heads * head_dim each), the router (d_model * num_experts) and the
    experts (3 * d_model * d_ff each). Around the layers: embedding and untied output projection (vocab_size * d_model
    each) and the last norm.

    Args:
        model: the architecture.

    Returns:
        Total and active parameters; an active token's embedding table counts whole, as in the paper.

    Source: Mixtral of Experts, arXiv 2401.04088, table 1 and section 2.1.
    """
    outside = 2 * model.vocab_size * model.d_model + model.d_model
    layer = _attention_weights(model) + model.d_model * model.num_experts + 2 * model.d_model
    expert = _expert_weights(model)
    return ParameterCounts(
        total=outside + model.num_layers * (layer + model.num_experts * expert),
        active=outside + model.num_layers * (layer + model.num_experts_per_tok * expert),
    )


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Computes the useful work of training on one token: forward and backward, nothing recomputed.

    6 * P + 6 * num_layers * seq_len * num_heads * head_dim, where

    - P counts the parameters that multiply a token: attention projections, router, the num_experts_per_tok chosen
      experts and the output projection; not the embedding (a look-up) and not the norms. A product with a parameter
      costs 2 FLOP forward and 4 backward.
    - the second term is attention's two products (queries with keys, weights with values) at 2 FLOP forward and 4
      backward each, over seq_len / 2 keys: the causal half of them. Document boundaries inside a packed row are
      not subtracted, padding of expert buffers and recomputation are not added.

    Args:
        model: the architecture.
        seq_len: tokens of a row.

    Returns:
        FLOP per token of a training step; a forward pass alone is a third of it.
    """
    layer = _attention_weights(model) + model.d_model * model.num_experts
    layer += model.num_experts_per_tok * _expert_weights(model)
    multiplied = model.num_layers * layer + model.vocab_size * model.d_model
    attention = model.num_layers * seq_len * model.num_heads * model.head_dim
    return 6.0 * (multiplied + attention)


def speed(tokens: int, seconds: float, flops: float, num_devices: int, peak: PeakFlops) -> dict[str, float]:
    """Turns a measured stretch of work into the rates that are logged.

    Args:
        tokens: tokens that went through the model, over all devices.
        seconds: wall time of that.
        flops: FLOP per token, see `flops_per_token`.
        num_devices: devices of the whole mesh.
        peak: of one device.

    Returns:
        `tokens_per_second`, `model_flops_per_second` (both over all devices) and `mfu`, a share:
        model FLOP/s / (num_devices * peak).
    """
    tokens_per_second = tokens / seconds
    model_flops = tokens_per_second * flops
    return {
        "tokens_per_second": tokens_per_second,
        "model_flops_per_second": model_flops,
        "mfu": model_flops / (num_devices * peak.value),
    }


def _attention_weights(model: ModelConfig) -> int:
    return 2 * model.d_model * model.head_dim * (model.num_heads + model.num_kv_heads)


def _expert_weights(model: ModelConfig) -> int:
    return 3 * model.d_model * model.d_ff
