"""Writes adapters as the package `peft` does, with the names of transformers 4, which `peft` converts for later ones.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from mixtral_jax.config import ModelConfig, ObjectiveConfig
from mixtral_jax.distributed.processes import take_turn, with_all
from mixtral_jax.runs.sources import Source
from mixtral_jax.weights.destination import new_directory
from mixtral_jax.weights.exporting import check_exportable
from mixtral_jax.weights.names import FORMATS, external_tensors
from mixtral_jax.weights.safetensors_files import SafetensorsWriter
from mixtral_jax.whole_files import flush


def export_peft(source: Source, config: ModelConfig, objective: ObjectiveConfig, directory: Path) -> list[Path]:
    """Writes adapters for the model that `--format hf` makes of their base.

    Several processes call it together, and each writes its share.

    Args:
        source: of adapters, as the part `params`, and selection bias.
        config: the architecture.
        objective: rank and scale of the adapters.
        directory: created; must not exist or be empty. It appears whole or not at all.

    Returns:
        The files.

    Raises:
        UserError: a directory in use, or a model that the format cannot hold.
    """
    check_exportable(source, config, FORMATS["hf"], None)
    factors = dict(_factors(source.parts["params"], config))
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
        shapes = {key: factor.shape for key, factor in factors.items()}
        writer = SafetensorsWriter(partial / "adapter_model.safetensors", shapes, "float32")

        def write(key: str) -> str:
            writer.write(key, [factors[key].read(source)])
            return ""

        def write_all(ask: Callable[[list[str]], list[str]]) -> None:
            (partial / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            writer.create()
            ask([*factors])
            for file in partial.iterdir():
                flush(file)

        with_all(take_turn(), write, write_all)
    return sorted(directory.iterdir())


@dataclass(frozen=True)
class _Factor:
    """A or B of one matrix: where it lies among the adapters, and how `peft` has it."""

    name: str
    lead: tuple[int, ...]  # layer, and expert of a parameter that has one matrix an expert
    stored: tuple[int, ...]  # its shape where it lies, the leading axes whole
    shape: tuple[int, ...]  # [rank, inputs] or [outputs, rank]

    def read(self, source: Source) -> UInt32[np.ndarray, "_ _"]:
        rest = self.stored[len(self.lead) :]
        block = source.block("params", self.name, (*self.lead, *[0] * len(rest)), (*[1] * len(self.lead), *rest))
        return np.ascontiguousarray(block.reshape(self.shape[::-1]).T).view(np.uint32)


def _factors(adapters: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, _Factor]]:
    """Lists A and B of every matrix under the names of `peft`."""
    for tensor in external_tensors(FORMATS["hf"], config):
        (row,) = tensor.rows
        path = row.path.removeprefix("layers/")
        if f"{path}/a" in adapters:
            lead = (tensor.layer,) if tensor.expert is None else (tensor.layer, tensor.expert)
            a, b = (adapters[f"{path}/{which}"].shape for which in "ab")
            rank = a[-1]
            inputs, outputs = math.prod(a[len(lead) : -1]), math.prod(b[len(lead) + 1 :])
            name = f"base_model.model.{tensor.key.removesuffix('weight')}"
            yield f"{name}lora_A.weight", _Factor(f"{path}/a", lead, a, (rank, inputs))
            yield f"{name}lora_B.weight", _Factor(f"{path}/b", lead, b, (outputs, rank))
