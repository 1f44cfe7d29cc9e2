"""transformers' Mixtral with random weights, in float32 on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixtral_jax.config import ModelConfig

torch.set_num_threads(1)


def make_oracle(config: ModelConfig, seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """Builds a model whose routers are far from ties and whose norms are not all 1."""
    torch.manual_seed(seed)
    described = MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=4096,
        sliding_window=None,
        **changes,
    )
    model = MixtralForCausalLM(described).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def save(model: MixtralForCausalLM, directory: Path) -> None:
    """Saves as transformers does; several files."""
    model.save_pretrained(directory, max_shard_size="100KB")


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Draws token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)
