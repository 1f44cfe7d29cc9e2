"""Writes adapters as the package `peft` does, with the names of transformers 4, which `peft` converts for later ones.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from mixtral_jax.config import ModelConfig, ObjectiveConfig
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.runs.sources import DeviceArrays
from mixtral_jax.weights.destination import new_directory
from mixtral_jax.weights.exporting import check_exportable
from mixtral_jax.weights.names import FORMATS, external_tensors
from mixtral_jax.weights.safetensors_files import SafetensorsWriter


def export_peft(arrays: Arrays, config: ModelConfig, objective: ObjectiveConfig, directory: Path) -> list[Path]:
    """Writes adapters for the model that `--format hf` makes of their base.

    Args:
        arrays: adapters and selection bias, all on this process's devices.
        config: the architecture.
        objective: rank and scale of the adapters.
        directory: created; must not exist or be empty. It appears whole or not at all.

    Returns:
        The files.

    Raises:
        UserError: a directory in use, or a model that the format cannot hold.
    """
    check_exportable(DeviceArrays(arrays), config, FORMATS["hf"], None)
    factors = dict(_factors(arrays, config))
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": objective.lora_rank,
        "lora_alpha": objective.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({key.split(".")[-3] for key in factors}),
        "inference_mode": True,
    }
    with new_directory(directory) as partial:
        (partial / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        shapes = {key: matrix.shape for key, matrix in factors.items()}
        writer = SafetensorsWriter(partial / "adapter_model.safetensors", shapes, "float32")
        writer.create()
        for key, matrix in factors.items():
            writer.write(key, [np.ascontiguousarray(matrix).view(np.uint32)])
    return sorted(directory.iterdir())


def _factors(arrays: Arrays, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Lists A as [rank, inputs] and B as [outputs, rank] of every matrix."""
    adapters = jax.tree.map(np.asarray, arrays["adapters"])
    for tensor in external_tensors(FORMATS["hf"], config):
        (row,) = tensor.rows
        if pair := adapters.get(row.path.removeprefix("layers/")):
            place = (tensor.layer,) if tensor.expert is None else (tensor.layer, tensor.expert)
            a, b, name = pair["a"][place], pair["b"][place], f"base_model.model.{tensor.key.removesuffix('weight')}"
            yield f"{name}lora_A.weight", a.reshape(-1, a.shape[-1]).T
            yield f"{name}lora_B.weight", b.reshape(b.shape[0], -1).T
