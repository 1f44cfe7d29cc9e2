"""Streams a model into files of a released format, in threads and processes."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.distributed.processes import is_main, take_turn, with_all
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.runs.sources import DeviceArrays, Source
from mixtral_jax.weights.blocks import all_finite, block_layout, converted, file_view, turned
from mixtral_jax.weights.destination import new_directory
from mixtral_jax.weights.hf_tokenizer import tokenizer_files
from mixtral_jax.weights.names import FORMATS, ExternalTensor, Format, FormatName, external_tensors
from mixtral_jax.weights.progress import byte_progress, counted
from mixtral_jax.weights.released_config import describe_hf, describe_mistral
from mixtral_jax.weights.safetensors_files import SafetensorsWriter
from mixtral_jax.weights.stored import FILE_TYPES, FileType
from mixtral_jax.weights.torch_files import TorchWriter
from mixtral_jax.whole_files import flush

EXPORT_FORMATS: tuple[FormatName, ...] = ("hf", "hf-fused", "mistral", "mistral-fused")
SHARD_BYTES = 5 * 10**9  # of one Hugging Face file, at most, if no tensor is larger
LAYERS_A_FILE = 4  # of the fused Mistral format
THREADS = 3  # of a process; each holds a block or two


@dataclass(frozen=True)
class About:
    """What a release says of a model beside its tensors."""

    context: int  # longest sequence that it is meant for, tokens; Hugging Face's config.json states it
    load_balance: float  # our coefficient of the load-balancing loss; written in Hugging Face's scale
    tokenizer: bytes | None = None  # a sentencepiece model to put beside the weights
    eos: int | list[int] | None = None  # what ends a text, in Hugging Face's config.json; None: the tokenizer's


def export_weights(
    arrays: Arrays | Source,
    config: ModelConfig,
    directory: str | Path,
    format_name: FormatName,
    about: About,
    *,
    dtype: FileType | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes a model as a released checkpoint; the host holds a few blocks at a time.

    Several processes call it together, and each writes its share.

    Args:
        arrays: {"params": ..., "selection_bias": ...}, all on this process's devices; or where they are read.
        config: the architecture.
        directory: created; must not exist or be empty. It appears whole or not at all.
        format_name: one of EXPORT_FORMATS.
        about: what else is written.
        dtype: of the tensors; None: the parameters' own.
        shard_bytes: largest file of the Hugging Face formats.

    Returns:
        The files.

    Raises:
        UserError: a directory in use, a model that the formats cannot hold, or values that `dtype` cannot.
    """
    directory = Path(directory)
    layout, source = FORMATS[format_name], source_of(arrays)
    kind = dtype or own_type(source)
    check_exportable(source, config, layout, about.tokenizer)
    plan = _plan_files(list(external_tensors(layout, config)), layout, FILE_TYPES[kind].itemsize, shard_bytes)
    with new_directory(directory) as partial:
        _write_tensors(plan, source, config, layout, kind, partial)
        if is_main():
            _write_words(config, layout, kind, about, partial)
            for file in partial.iterdir():
                flush(file)
    return sorted(directory.iterdir())


def source_of(arrays: Arrays | Source) -> Source:
    """Arrays on devices as a source, which other things are already."""
    return DeviceArrays(arrays) if isinstance(arrays, Mapping) else arrays


def own_type(source: Source) -> FileType:
    """The type of a model's parameters."""
    return np.dtype(source.parts["params"]["embedding"].dtype).name  # type: ignore[return-value]


def check_exportable(source: Source, config: ModelConfig, layout: Format, tokenizer: bytes | None) -> None:
    """Raises `UserError` for what a format has no place for."""
    if config.rope_scaling.kind != "none" and layout.config_file == "params.json":
        raise UserError(
            f"params.json has no place for model.rope_scaling.kind={config.rope_scaling.kind}: use --format hf"
        )
    for name, leaf in source.parts["selection_bias"].items():
        if np.any(source.block("selection_bias", name, (0,) * len(leaf.shape), leaf.shape) != 0):
            raise UserError(
                "this model's routers choose with a bias (losses.selection_bias_rate), for which no released format "
                "has a place: export a model that was trained without it"
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
    plan: Plan, source: Source, config: ModelConfig, layout: Format, dtype: FileType, directory: Path
) -> None:
    """Writes all tensors, and where each is."""
    itemsize = FILE_TYPES[dtype].itemsize
    total = sum(int(np.prod(tensor.shape)) * itemsize for part in plan.values() for tensor in part)
    shapes = {name: {tensor.key: tensor.shape for tensor in tensors} for name, tensors in plan.items()}
    writers = {
        name: SafetensorsWriter(directory / name, shapes[name], dtype) for name in plan if name.endswith(".safetensors")
    }
    # Tensors find their places in the one kind of file by themselves; the other kind has an order.
    work = [
        (name, some)
        for name, tensors in plan.items()
        for some in ([[tensor] for tensor in tensors] if name in writers else [tensors])
    ]

    def write(item: str) -> str:
        name, tensors = work[int(item)]
        if name in writers:
            writers[name].write(tensors[0].key, read(tensors[0]))
        else:
            with TorchWriter(directory / name, shapes[name], dtype) as writer:
                for tensor in tensors:
                    writer.write(tensor.key, read(tensor))
        return ""

    def write_all(ask: Callable[[list[str]], list[str]]) -> None:
        for writer in writers.values():
            writer.create()
        ask([str(number) for number in range(len(work))])

    with byte_progress(f"export {layout.name}", total) as advance:

        def read(tensor: ExternalTensor) -> Iterator[np.ndarray]:
            return counted(pieces(source, config, tensor, dtype), advance)

        with_all(take_turn(), write, write_all, THREADS)
    if is_main() and layout.config_file == "config.json" and len(plan) > 1:
        weight_map = {tensor.key: name for name, tensors in plan.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def pieces(source: Source, config: ModelConfig, tensor: ExternalTensor, dtype: FileType) -> Iterator[np.ndarray]:
    """Reads a tensor in the order of its file, a block at a time.

    Args:
        source: of the parameters.
        config: the architecture.
        tensor: which one.
        dtype: that it has in the file.

    Yields:
        Its values, as unsigned integers.

    Raises:
        UserError: values that the type cannot hold.
    """
    layouts = {row: block_layout(row, config) for row in tensor.rows}
    experts = max(layout.num_experts for layout in layouts.values()) or 1
    for expert in range(experts) if tensor.expert is None else (tensor.expert,):
        for row in sorted(layouts, key=lambda row: row.part):
            layout = layouts[row]
            start = layout.start_of(tensor.layer, expert)
            block = source.block("params", row.path, start, layout.ours_shape)
            values = converted(turned(file_view(block, layout)), FILE_TYPES[dtype])
            if not all_finite(values):
                raise UserError(
                    f"'{tensor.key}' has values that {dtype} cannot hold, or NaN: choose --dtype bfloat16 or "
                    "float32, or another checkpoint"
                )
            yield values.view(f"u{values.dtype.itemsize}")


def _write_words(config: ModelConfig, layout: Format, dtype: FileType, about: About, directory: Path) -> None:
    """Writes everything but tensors."""
    known = Tokenizer(about.tokenizer) if about.tokenizer else None
    if layout.config_file == "config.json":
        ids: dict[str, Any] = {"bos": known.bos_id, "eos": known.eos_id} if known else {}
        ids |= {} if about.eos is None else {"eos": about.eos}
        description = describe_hf(config, dtype=dtype, context=about.context, load_balance=about.load_balance, **ids)
    else:
        description = describe_mistral(config, layout)
    (directory / layout.config_file).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if known:
        known.save(directory / "tokenizer.model")
    if known and layout.config_file == "config.json":
        generation = {f"{name}_token_id": description[f"{name}_token_id"] for name in ("bos", "eos")}
        generation["pad_token_id"] = known.unk_id
        written = {**tokenizer_files(known.model_bytes), "generation_config.json": json.dumps(generation) + "\n"}
        for name, content in written.items():
            (directory / name).write_text(content, encoding="utf-8")
