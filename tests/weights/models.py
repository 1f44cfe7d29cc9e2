"""Small architectures, the runtimes to put them on, and arrays for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import FloatName, ModelConfig
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.streaming import place
from mixtral_jax.runtime import Runtime, make_runtime
from mixtral_jax.weights.importing import ReleasedArrays
from mixtral_jax.weights.released import Released, Upcycling
from tests.tiny import mesh_of, tiny_config


def small(**changes: Any) -> ModelConfig:
    """The tiny architecture with the released models' rotary base, changed."""
    return tiny_config(model={"rope_theta": 1e6, **changes}).model


def runtime(
    model: ModelConfig,
    *,
    params: FloatName = "float32",
    seq_len: int = 16,
    batch: int = 8,
    matmul: str = "xla",
    **mesh: int,
) -> Runtime:
    """A runtime on as many of the simulated devices as the mesh has; without sizes, on one."""
    config = tiny_config(
        model=dataclasses.asdict(model),
        data={"seq_len": seq_len},
        train={"batch_size": batch},
        precision={"params": params},
        kernels={"matmul": matmul},
    )
    return make_runtime(config, mesh_of(**mesh))


def blank(model: ModelConfig, value: float = 0.5) -> dict[str, Any]:
    """Arrays of one value, on one device; the selection bias is zero."""
    abstract = Architecture(model, runtime(model)).abstract()
    fill = lambda value: lambda leaf: jnp.full(leaf.shape, value, leaf.dtype, device=leaf.sharding)  # noqa: E731
    return {
        "params": jax.tree.map(fill(value), abstract["params"]),
        "selection_bias": jax.tree.map(fill(0), abstract["selection_bias"]),
    }


def import_arrays(released: Released, runtime: Runtime, upcycling: Upcycling | None = None) -> dict[str, Any]:
    """What an import writes into a checkpoint, put together on a mesh."""
    abstract = Architecture(released.config, runtime).abstract()
    source, values = ReleasedArrays(released, abstract, upcycling), []
    for part, leaves in source.parts.items():
        for name, leaf in leaves.items():
            values.append(np.empty(leaf.shape, leaf.dtype))
            for start in np.ndindex(leaf.shape[:2] if len(leaf.shape) > 2 else ()):  # a layer's or an expert's part
                begin = (*start, *[0] * (len(leaf.shape) - len(start)))
                shape = (*[1] * len(start), *leaf.shape[len(start) :])
                values[-1][place(begin, shape)] = source.block(part, name, begin, shape)
    tree = jax.tree.unflatten(jax.tree.structure(abstract), values)
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), tree, abstract)
