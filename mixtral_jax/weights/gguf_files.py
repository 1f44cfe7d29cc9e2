"""Writes a model as one GGUF file, which llama.cpp runs: weights, tokenizer and chat template."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from mixtral_jax.config import ModelConfig, RopeScalingConfig, UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.distributed.processes import take_turn, with_all
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.model.rope_scaling import attention_factor
from mixtral_jax.runs.sources import Source
from mixtral_jax.weights.chat_templates import chat_template
from mixtral_jax.weights.destination import new_file
from mixtral_jax.weights.exporting import THREADS, check_exportable, own_type, pieces, source_of
from mixtral_jax.weights.hf_tokenizer import is_exact
from mixtral_jax.weights.names import GGUF, ExternalTensor, external_tensors
from mixtral_jax.weights.progress import byte_progress, counted
from mixtral_jax.weights.stored import FileType, write_tensor
from mixtral_jax.whole_files import flush

GGUFType = FileType | Literal["q8_0"]
# Their names of types: of a tensor, and of a file whose matrices have it.
_TYPES: dict[GGUFType, tuple[str, str]] = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_BLOCK = 32  # numbers of a row that share a scale in Q8_0
_UNUSED = 5  # the type of a row of the embedding without a token


def export_gguf(
    arrays: Arrays | Source,
    config: ModelConfig,
    file: str | Path,
    *,
    context: int,
    dtype: GGUFType | None = None,
    tokenizer: bytes | None = None,
) -> Path:
    """Writes a model as a GGUF file; the host holds a few blocks at a time.

    Several processes call it together, and each writes its share.

    Norms and routers, of which llama.cpp takes nothing else, are float32 in every file.

    Args:
        arrays: {"params": ..., "selection_bias": ...}, all on this process's devices; or where they are read.
        config: the architecture.
        file: must not exist, and ends in .gguf. It appears whole or not at all.
        context: longest sequence that the model is meant for, tokens.
        dtype: of the matrices; None: the parameters' own.
        tokenizer: a sentencepiece model.

    Returns:
        The file.

    Raises:
        UserError: a name in use, a model or tokenizer that the format cannot hold, or values that `dtype` cannot.
    """
    file = Path(file)
    source = source_of(arrays)
    kind: GGUFType = dtype or own_type(source)
    check_exportable(source, config, GGUF, tokenizer)
    if kind == "q8_0" and (config.d_model % _BLOCK or config.d_ff % _BLOCK):
        raise UserError(
            f"Q8_0 holds rows of multiples of {_BLOCK}, and this model has d_model={config.d_model} and "
            f"d_ff={config.d_ff}: choose --dtype F16, BF16 or F32"
        )
    tensors = list(external_tensors(GGUF, config))
    sizes = [_size(tensor, kind) for tensor in tensors]
    with new_file(file) as partial, byte_progress("export gguf", sum(sizes)) as advance:

        def write(item: str) -> str:
            tensor, begin, end = tensors[int(item.split()[0])], *map(int, item.split()[1:])
            written = _pieces(source, config, tensor, _type_of(tensor, kind))
            write_tensor(partial, begin, end, counted(written, advance))
            return ""

        def write_all(ask: Callable[[list[str]], list[str]]) -> None:
            begin = _begin(partial, config, context, kind, tokenizer, tensors)
            work = []
            for number, size in enumerate(sizes):
                work.append(f"{number} {begin} {begin + size}")
                begin += gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT)
            os.truncate(partial, begin)
            ask(work)
            flush(partial)

        with_all(take_turn(), write, write_all, THREADS)
    return file


def _begin(
    file: Path,
    config: ModelConfig,
    context: int,
    kind: GGUFType,
    tokenizer: bytes | None,
    tensors: list[ExternalTensor],
) -> int:
    """Writes everything but the tensors; returns where these begin, in bytes."""
    writer = gguf.GGUFWriter(file, "llama")
    try:
        _describe(writer, config, context, kind)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        for tensor in tensors:
            raw = _raw(tensor, kind)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, raw)
            writer.add_tensor_info(tensor.key, shape, np.dtype(np.uint8), _size(tensor, kind), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return gguf.GGUFWriter.ggml_pad(file.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT)


def _describe(writer: gguf.GGUFWriter, config: ModelConfig, context: int, kind: GGUFType) -> None:
    writer.add_file_type(gguf.LlamaFileType[_TYPES[kind][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    scaling = config.rope_scaling
    if scaling.kind != "none":
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        own = attention_factor(RopeScalingConfig("yarn", factor=scaling.factor))  # which llama.cpp multiplies with
        writer.add_rope_scaling_attn_factors(attention_factor(scaling) / own)


def _add_tokenizer(writer: gguf.GGUFWriter, model_bytes: bytes | None, rows: int) -> None:
    if model_bytes is None:
        raise UserError("a GGUF file holds its tokenizer, and this checkpoint has none: use --format hf")
    if not is_exact(model_bytes):
        raise UserError(
            "llama.cpp would encode texts otherwise than this tokenizer, which is not a byte-pair model with byte "
            "fallback and without normalization: use --format hf"
        )
    tokenizer = Tokenizer(model_bytes)
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model_bytes).pieces  # type: ignore[attr-defined]  # made on import
    idle = range(len(pieces), rows)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in pieces] + [f"[PAD{index}]" for index in idle])
    writer.add_token_scores([piece.score for piece in pieces] + [-1e4] * len(idle))
    writer.add_token_types([piece.type for piece in pieces] + [_UNUSED] * len(idle))
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)


def _pieces(source: Source, config: ModelConfig, tensor: ExternalTensor, own: GGUFType) -> Iterator[np.ndarray]:
    """Reads a tensor in the order and type of the file, a block at a time; a scale of Q8_0 is of one row."""
    for piece in pieces(source, config, tensor, "float32" if own == "q8_0" else own):
        if own == "q8_0":
            rows = piece.view(np.float32).reshape(-1, tensor.shape[-1])
            yield gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
        else:
            yield piece


def _raw(tensor: ExternalTensor, kind: GGUFType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[_TYPES[_type_of(tensor, kind)][0]]


def _size(tensor: ExternalTensor, kind: GGUFType) -> int:
    """Counts the bytes of a tensor in the file."""
    return math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, _raw(tensor, kind)))


def _type_of(tensor: ExternalTensor, kind: GGUFType) -> GGUFType:
    small = len(tensor.shape) == 1 or tensor.rows[0].path == "layers/moe/router"
    return "float32" if small else kind
