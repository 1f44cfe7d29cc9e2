"""Which external tensor holds which part of which parameter: one table a format, read in both directions.

A tensor is described by its axes: `(heads head_dim) d_model` is a matrix whose rows run over heads and, inside a head,
over head_dim. Shapes, transposes, slices and their inverses all follow from the two descriptions of a row.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mixtral_jax.config import ModelConfig

# Our parameters: path in the tree of arrays -> axes. A test holds this against the model.
OURS = {
    "embedding": "vocab d_model",
    "layers/attention_norm/scale": "layers d_model",
    "layers/attention/wq": "layers d_model heads head_dim",
    "layers/attention/wk": "layers d_model kv_heads head_dim",
    "layers/attention/wv": "layers d_model kv_heads head_dim",
    "layers/attention/wo": "layers heads head_dim d_model",
    "layers/moe_norm/scale": "layers d_model",
    "layers/moe/router": "layers d_model experts",
    "layers/moe/w_gate": "layers experts d_model d_ff",
    "layers/moe/w_up": "layers experts d_model d_ff",
    "layers/moe/w_down": "layers experts d_ff d_model",
    "final_norm/scale": "d_model",
    "lm_head": "d_model vocab",
}


@dataclass(frozen=True)
class Row:
    """One correspondence: an external tensor (or a part of it) and a parameter."""

    key: str  # name of the external tensor, with {layer} and {expert}
    path: str  # of the parameter
    axes: str  # of the external tensor
    part: int = 0  # which half of the axis `part` belongs to this parameter


FormatName = Literal["hf", "hf-fused", "mistral", "mistral-fused", "hf-dense", "mistral-dense", "gguf"]


@dataclass(frozen=True)
class Format:
    """One way to lay out a model in files."""

    name: FormatName
    config_file: Literal["config.json", "params.json", ""]  # "": the file of the tensors says all
    rows: tuple[Row, ...]
    dense: bool = False  # no experts: can only be upcycled


_HF_ENDS = (
    Row("model.embed_tokens.weight", "embedding", "vocab d_model"),
    Row("model.norm.weight", "final_norm/scale", "d_model"),
    Row("lm_head.weight", "lm_head", "vocab d_model"),
)
_HF = "model.layers.{layer}."
_HF_ATTENTION = (
    Row(_HF + "input_layernorm.weight", "layers/attention_norm/scale", "d_model"),
    Row(_HF + "self_attn.q_proj.weight", "layers/attention/wq", "(heads head_dim) d_model"),
    Row(_HF + "self_attn.k_proj.weight", "layers/attention/wk", "(kv_heads head_dim) d_model"),
    Row(_HF + "self_attn.v_proj.weight", "layers/attention/wv", "(kv_heads head_dim) d_model"),
    Row(_HF + "self_attn.o_proj.weight", "layers/attention/wo", "d_model (heads head_dim)"),
    Row(_HF + "post_attention_layernorm.weight", "layers/moe_norm/scale", "d_model"),
)
_MISTRAL_ENDS = (
    Row("tok_embeddings.weight", "embedding", "vocab d_model"),
    Row("norm.weight", "final_norm/scale", "d_model"),
    Row("output.weight", "lm_head", "vocab d_model"),
)
_MISTRAL = "layers.{layer}."
# Mistral rotates neighbours (2 half + pair), this model and Hugging Face rotate halves: head_dim = (pair half).
_MISTRAL_ATTENTION = (
    Row(_MISTRAL + "attention_norm.weight", "layers/attention_norm/scale", "d_model"),
    Row(_MISTRAL + "attention.wq.weight", "layers/attention/wq", "(heads half pair) d_model"),
    Row(_MISTRAL + "attention.wk.weight", "layers/attention/wk", "(kv_heads half pair) d_model"),
    Row(_MISTRAL + "attention.wv.weight", "layers/attention/wv", "(kv_heads head_dim) d_model"),
    Row(_MISTRAL + "attention.wo.weight", "layers/attention/wo", "d_model (heads head_dim)"),
    Row(_MISTRAL + "ffn_norm.weight", "layers/moe_norm/scale", "d_model"),
)


def _swiglu(gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Rows of matrices in PyTorch's order, [out, in]."""
    return (
        Row(gate, "layers/moe/w_gate", "d_ff d_model"),
        Row(up, "layers/moe/w_up", "d_ff d_model"),
        Row(down, "layers/moe/w_down", "d_model d_ff"),
    )


_HF_EXPERT = _HF + "block_sparse_moe.experts.{expert}."
_MISTRAL_EXPERT = _MISTRAL + "feed_forward.experts.{expert}."

FORMATS: dict[FormatName, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "hf",
            "config.json",
            (
                *_HF_ENDS,
                *_HF_ATTENTION,
                Row(_HF + "block_sparse_moe.gate.weight", "layers/moe/router", "experts d_model"),
                *_swiglu(_HF_EXPERT + "w1.weight", _HF_EXPERT + "w3.weight", _HF_EXPERT + "w2.weight"),
            ),
        ),
        Format(
            "hf-fused",
            "config.json",
            (
                *_HF_ENDS,
                *_HF_ATTENTION,
                Row(_HF + "mlp.gate.weight", "layers/moe/router", "experts d_model"),
                Row(_HF + "mlp.experts.gate_up_proj", "layers/moe/w_gate", "experts (part d_ff) d_model", part=0),
                Row(_HF + "mlp.experts.gate_up_proj", "layers/moe/w_up", "experts (part d_ff) d_model", part=1),
                Row(_HF + "mlp.experts.down_proj", "layers/moe/w_down", "experts d_model d_ff"),
            ),
        ),
        Format(
            "mistral",
            "params.json",
            (
                *_MISTRAL_ENDS,
                *_MISTRAL_ATTENTION,
                Row(_MISTRAL + "feed_forward.gate.weight", "layers/moe/router", "experts d_model"),
                *_swiglu(_MISTRAL_EXPERT + "w1.weight", _MISTRAL_EXPERT + "w3.weight", _MISTRAL_EXPERT + "w2.weight"),
            ),
        ),
        Format(
            "mistral-fused",
            "params.json",
            (
                *_MISTRAL_ENDS,
                *_MISTRAL_ATTENTION,
                Row(_MISTRAL + "block_sparse_moe.gate.weight", "layers/moe/router", "experts d_model"),
                Row(_MISTRAL + "block_sparse_moe.w1", "layers/moe/w_gate", "(experts d_ff) d_model"),
                Row(_MISTRAL + "block_sparse_moe.w3", "layers/moe/w_up", "(experts d_ff) d_model"),
                # w2 too has its d_ff in the rows: each expert's slice is the transpose of the other formats' w2.
                Row(_MISTRAL + "block_sparse_moe.w2", "layers/moe/w_down", "(experts d_ff) d_model"),
            ),
        ),
        Format(
            "hf-dense",
            "config.json",
            (
                *_HF_ENDS,
                *_HF_ATTENTION,
                *_swiglu(_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight", _HF + "mlp.down_proj.weight"),
            ),
            dense=True,
        ),
        Format(
            "mistral-dense",
            "params.json",
            (
                *_MISTRAL_ENDS,
                *_MISTRAL_ATTENTION,
                *_swiglu(
                    _MISTRAL + "feed_forward.w1.weight",
                    _MISTRAL + "feed_forward.w3.weight",
                    _MISTRAL + "feed_forward.w2.weight",
                ),
            ),
            dense=True,
        ),
    )
}

# llama.cpp's names, written only. It rotates neighbours as Mistral does.
_GGUF = "blk.{layer}."
GGUF = Format(
    "gguf",
    "",
    (
        Row("token_embd.weight", "embedding", "vocab d_model"),
        Row("output_norm.weight", "final_norm/scale", "d_model"),
        Row("output.weight", "lm_head", "vocab d_model"),
        Row(_GGUF + "attn_norm.weight", "layers/attention_norm/scale", "d_model"),
        Row(_GGUF + "attn_q.weight", "layers/attention/wq", "(heads half pair) d_model"),
        Row(_GGUF + "attn_k.weight", "layers/attention/wk", "(kv_heads half pair) d_model"),
        Row(_GGUF + "attn_v.weight", "layers/attention/wv", "(kv_heads head_dim) d_model"),
        Row(_GGUF + "attn_output.weight", "layers/attention/wo", "d_model (heads head_dim)"),
        Row(_GGUF + "ffn_norm.weight", "layers/moe_norm/scale", "d_model"),
        Row(_GGUF + "ffn_gate_inp.weight", "layers/moe/router", "experts d_model"),
        Row(_GGUF + "ffn_gate_exps.weight", "layers/moe/w_gate", "experts d_ff d_model"),
        Row(_GGUF + "ffn_up_exps.weight", "layers/moe/w_up", "experts d_ff d_model"),
        Row(_GGUF + "ffn_down_exps.weight", "layers/moe/w_down", "experts d_model d_ff"),
    ),
)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the length of every axis that the tables name."""
    return {
        "layers": config.num_layers,
        "experts": config.num_experts,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "half": config.head_dim // 2,
        "pair": 2,
        "part": 2,
        "vocab": config.vocab_size,
    }


def groups(axes: str) -> list[list[str]]:
    """Splits a description into dimensions, each a list of axes: `(a b) c` -> [[a, b], [c]]."""
    dimensions: list[list[str]] = []
    inside = False
    for word in axes.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            if inside:
                dimensions.append([])
        elif inside:
            dimensions[-1].append(word)
        else:
            dimensions.append([word])
    return dimensions


def atoms(axes: str) -> list[str]:
    """Lists the axes of a description, outermost first."""
    return [axis for dimension in groups(axes) for axis in dimension]


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor as it lies in a file, and the rows of the table that share it."""

    key: str
    shape: tuple[int, ...]
    rows: tuple[Row, ...]
    layer: int  # of the tensors outside of the layers: the nearest
    expert: int | None  # None: of all experts, or of none


def num_tensors(layout: Format, config: ModelConfig) -> int:
    """Counts the tensors of a model in a format."""
    per_key = ((config.num_layers, "{layer}"), (config.num_experts, "{expert}"))
    return sum(math.prod(count for count, place in per_key if place in key) for key in {row.key for row in layout.rows})


def external_tensors(layout: Format, config: ModelConfig) -> Iterator[ExternalTensor]:
    """Lists every tensor of a model in a format, in the order in which they are written."""
    sizes = axis_sizes(config)
    by_key: dict[str, list[Row]] = {}
    for row in layout.rows:
        by_key.setdefault(row.key, []).append(row)
    in_layers = [key for key in by_key if "{layer}" in key]
    ends = [key for key in by_key if "{layer}" not in key]
    first = ((key, 0) for key in ends if by_key[key][0].path == "embedding")
    layers = ((key, layer) for layer in range(config.num_layers) for key in in_layers)
    last = ((key, config.num_layers - 1) for key in ends if by_key[key][0].path != "embedding")
    for key, layer in itertools.chain(first, layers, last):  # a configuration may ask for more layers than fit a list
        rows = tuple(by_key[key])
        shape = tuple(math.prod(sizes[axis] for axis in dimension) for dimension in groups(rows[0].axes))
        for expert in range(config.num_experts) if "{expert}" in key else (None,):
            yield ExternalTensor(key.format(layer=layer, expert=expert), shape, rows, layer, expert)
