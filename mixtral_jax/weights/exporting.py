"""Streams a model's arrays into files of a released format."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.weights.blocks import BlockLayout, block_layout, copy_turned, host_view, take_block
from mixtral_jax.weights.destination import new_directory
from mixtral_jax.weights.hf_tokenizer import tokenizer_files
from mixtral_jax.weights.names import FORMATS, ExternalTensor, Format, FormatName, Row, external_tensors
from mixtral_jax.weights.progress import byte_progress
from mixtral_jax.weights.released_config import describe_hf, describe_mistral
from mixtral_jax.weights.safetensors_files import SafetensorsWriter
from mixtral_jax.weights.stored import FILE_TYPES, FileType
from mixtral_jax.weights.torch_files import TorchWriter

EXPORT_FORMATS: tuple[FormatName, ...] = ("hf", "hf-fused", "mistral", "mistral-fused")
SHARD_BYTES = 5 * 10**9  # of one Hugging Face file, at most, if no tensor is larger
LAYERS_A_FILE = 4  # of the fused Mistral format


def export_weights(
    arrays: Arrays,
    config: ModelConfig,
    directory: str | Path,
    format_name: FormatName,
    *,
    context: int,
    load_balance: float,
    dtype: FileType | None = None,
    tokenizer: bytes | None = None,
    eos: int | list[int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes a model as a released checkpoint; the host holds one tensor and one block at a time.

    Args:
        arrays: {"params": ..., "selection_bias": ...}, all on this process's devices.
        config: the architecture.
        directory: created; must not exist or be empty. It appears whole or not at all.
        format_name: one of EXPORT_FORMATS.
        context: longest sequence that the model is meant for, tokens; Hugging Face's config.json states it.
        load_balance: our coefficient of the load-balancing loss; written in Hugging Face's scale.
        dtype: of the tensors; None: the parameters' own.
        tokenizer: a sentencepiece model to put beside the weights.
        eos: tokens that end a generated text; Hugging Face's config.json states them. None: the tokenizer's.
        shard_bytes: largest file of the Hugging Face formats.

    Returns:
        The files.

    Raises:
        UserError: a directory in use, a model that the formats cannot hold, or values that `dtype` cannot.
    """
    directory = Path(directory)
    layout = FORMATS[format_name]
    params = arrays["params"]
    kind: FileType = dtype or jnp.dtype(params["embedding"].dtype).name  # type: ignore[assignment]
    check_exportable(arrays, config, layout, tokenizer)
    plan = _plan_files(list(external_tensors(layout, config)), layout, FILE_TYPES[kind].itemsize, shard_bytes)

    known = Tokenizer(tokenizer) if tokenizer else None
    with new_directory(directory) as partial:
        _write_tensors(plan, params, config, layout, kind, partial)
        if layout.config_file == "config.json":
            ids: dict[str, Any] = {"bos": known.bos_id, "eos": known.eos_id} if known else {}
            ids |= {} if eos is None else {"eos": eos}
            description = describe_hf(config, dtype=kind, context=context, load_balance=load_balance, **ids)
        else:
            description = describe_mistral(config, layout)
        (partial / layout.config_file).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if known:
            known.save(partial / "tokenizer.model")
        if known and layout.config_file == "config.json":
            generation = {f"{name}_token_id": description[f"{name}_token_id"] for name in ("bos", "eos")}
            generation["pad_token_id"] = known.unk_id
            written = {**tokenizer_files(known.model_bytes), "generation_config.json": json.dumps(generation) + "\n"}
            for name, content in written.items():
                (partial / name).write_text(content, encoding="utf-8")
    return sorted(directory.iterdir())


def check_exportable(arrays: Arrays, config: ModelConfig, layout: Format, tokenizer: bytes | None) -> None:
    """Raises `UserError` for what a format has no place for."""
    if config.rope_scaling.kind != "none" and layout.config_file == "params.json":
        raise UserError(
            f"params.json has no place for model.rope_scaling.kind={config.rope_scaling.kind}: use --format hf"
        )
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(arrays)):
        raise UserError("the model is spread over several processes: run the export in one, with all of the devices")
    if any(jnp.any(bias != 0) for bias in jax.tree.leaves(arrays["selection_bias"])):
        raise UserError(
            "this model's routers choose with a bias (losses.selection_bias_rate), for which no released format has a "
            "place: export a model that was trained without it"
        )
    if tokenizer is not None:
        size = Tokenizer(tokenizer).vocab_size
        if size > config.vocab_size:
            raise UserError(f"the tokenizer has {size} pieces but model.vocab_size is {config.vocab_size}")


Plan = dict[str, list[ExternalTensor]]


def _plan_files(tensors: list[ExternalTensor], layout: Format, itemsize: int, shard_bytes: int) -> Plan:
    """Distributes tensors over files, in order."""
    if layout.name == "mistral":
        return {"consolidated.safetensors": tensors}
    files: list[list[ExternalTensor]] = [[]]
    if layout.name == "mistral-fused":
        files = [[] for _ in range(tensors[-1].layer // LAYERS_A_FILE + 1)]
        for tensor in tensors:
            files[tensor.layer // LAYERS_A_FILE].append(tensor)
        return {f"consolidated.{number:02d}.pt": part for number, part in enumerate(files)}
    filled = 0
    for tensor in tensors:
        size = int(np.prod(tensor.shape)) * itemsize
        if files[-1] and filled + size > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += size
    if len(files) == 1:
        return {"model.safetensors": tensors}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": part for number, part in enumerate(files, 1)}


def _write_tensors(
    plan: Plan, params: dict[str, Any], config: ModelConfig, layout: Format, dtype: FileType, directory: Path
) -> None:
    itemsize = FILE_TYPES[dtype].itemsize
    total = sum(int(np.prod(tensor.shape)) * itemsize for part in plan.values() for tensor in part)
    reader = Reader(params, config)
    with byte_progress(f"export {layout.name}", total) as advance:
        for name, tensors in plan.items():
            shapes = {tensor.key: tensor.shape for tensor in tensors}
            writer = (SafetensorsWriter if name.endswith(".safetensors") else TorchWriter)(
                directory / name, shapes, dtype
            )
            with writer:
                for tensor in tensors:
                    values = reader.read(tensor, dtype)
                    writer.write(tensor.key, values)
                    advance(values.nbytes)
                    del values  # before the next one is allocated
    if layout.config_file == "config.json" and len(plan) > 1:
        weight_map = {tensor.key: name for name, tensors in plan.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class Reader:
    """Assembles external tensors on the host, out of blocks that no device exchanges with another."""

    def __init__(self, params: dict[str, Any], config: ModelConfig):
        self.params, self.config = params, config
        # The last block: it holds all experts where the mesh splits them, and the next tensors need the others.
        self._last: tuple[Any, np.ndarray] | None = None

    def read(self, tensor: ExternalTensor, dtype: FileType) -> np.ndarray:
        """Returns a tensor as unsigned integers; `UserError` if it has values that the type cannot hold."""
        values = np.empty(tensor.shape, _bits(dtype))
        for row in tensor.rows:
            parameter: Any = self.params
            for name in row.path.split("/"):
                parameter = parameter[name]
            layout = block_layout(row, self.config, parameter.sharding)
            if not layout.num_experts:
                block = self._block(tensor, row, parameter, layout, 0, dtype)
                copy_turned(host_view(values, row, self.config, layout, 0), block)
                continue
            for expert in range(layout.num_experts) if tensor.expert is None else (tensor.expert,):
                place = expert % layout.experts_per_block
                block = self._block(tensor, row, parameter, layout, expert - place, dtype)
                copy_turned(host_view(values, row, self.config, layout, expert), block[place])
        return values

    def _block(
        self, tensor: ExternalTensor, row: Row, parameter: jax.Array, layout: BlockLayout, expert: int, dtype: FileType
    ) -> np.ndarray:
        name = (row.path, tensor.layer, expert)
        if self._last is None or self._last[0] != name:
            self._last = None
            block, finite = take_block(parameter, tensor.layer, expert, layout=layout, dtype=FILE_TYPES[dtype])
            if not finite:
                raise UserError(
                    f"'{tensor.key}' has values that {dtype} cannot hold, or NaN: choose --dtype bfloat16 or "
                    "float32, or another checkpoint"
                )
            self._last = name, np.asarray(block).view(_bits(dtype))
        return self._last[1]


def _bits(dtype: FileType) -> np.dtype:
    """The unsigned integer as wide as a float type."""
    return np.dtype(f"u{FILE_TYPES[dtype].itemsize}")
