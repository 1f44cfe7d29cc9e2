"""Small architectures and the runtimes to put them on."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.config import Config, DataConfig, FloatName, MeshConfig, ModelConfig, PrecisionConfig, TrainConfig
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import Runtime, make_runtime
from mixtral_jax.sharding import make_mesh

SMALL = ModelConfig(
    d_model=32,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    rope_theta=1e6,
    norm_eps=1e-5,
)


def small(**changes: Any) -> ModelConfig:
    """The small architecture, changed."""
    return dataclasses.replace(SMALL, **changes)


def runtime(
    model: ModelConfig, *, params: FloatName = "float32", seq_len: int = 16, batch: int = 8, **mesh: int
) -> Runtime:
    """A runtime on as many of the simulated devices as the mesh has; without sizes, on one."""
    sizes = MeshConfig(**{"fsdp": 1, **mesh})
    config = Config(
        model=model,
        data=DataConfig(seq_len=seq_len),
        train=TrainConfig(steps=1, batch_size=batch),
        precision=PrecisionConfig(params=params),
    )
    return make_runtime(config, make_mesh(sizes, jax.devices()[: math.prod(dataclasses.asdict(sizes).values())]))


def blank(model: ModelConfig, value: float = 0.5) -> dict[str, Any]:
    """Arrays of one value, on one device; the selection bias is zero."""
    abstract = Architecture(model, runtime(model)).abstract()
    fill = lambda value: lambda leaf: jnp.full(leaf.shape, value, leaf.dtype, device=leaf.sharding)  # noqa: E731
    return {
        "params": jax.tree.map(fill(value), abstract["params"]),
        "selection_bias": jax.tree.map(fill(0), abstract["selection_bias"]),
    }
