"""Released checkpoints with random bits, laid out by hand: nothing here is shared with the package's tables."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mixtral_jax.config import ModelConfig
from mixtral_jax.weights.stored import FILE_TYPES, FileType
from mixtral_jax.weights.torch_files import TorchWriter, read_torch

Tensors = dict[str, np.ndarray]


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: FileType) -> np.ndarray:
    """Draws all finite numbers of a type: tiny ones, negative zeros, subnormals."""
    kind = FILE_TYPES[dtype]
    bits = rng.integers(0, 256, (*shape, kind.itemsize), dtype=np.uint8).reshape(*shape[:-1], -1).view(kind)
    return np.where(np.isfinite(bits.astype(np.float32)), bits, kind.type(0.5))


def classic(config: ModelConfig, dtype: FileType, seed: int = 0) -> Tensors:
    """A model in Hugging Face's classic keys."""
    rng = np.random.default_rng(seed)
    c, heads = config, config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    shapes = {
        "model.embed_tokens.weight": (c.vocab_size, c.d_model),
        "model.norm.weight": (c.d_model,),
        "lm_head.weight": (c.vocab_size, c.d_model),
    }
    for n in range(c.num_layers):
        layer = f"model.layers.{n}."
        shapes |= {
            layer + "input_layernorm.weight": (c.d_model,),
            layer + "post_attention_layernorm.weight": (c.d_model,),
            layer + "self_attn.q_proj.weight": (heads, c.d_model),
            layer + "self_attn.k_proj.weight": (kv_heads, c.d_model),
            layer + "self_attn.v_proj.weight": (kv_heads, c.d_model),
            layer + "self_attn.o_proj.weight": (c.d_model, heads),
            layer + "block_sparse_moe.gate.weight": (c.num_experts, c.d_model),
        }
        for e in range(c.num_experts):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            shapes |= {
                expert + "w1.weight": (c.d_ff, c.d_model),
                expert + "w2.weight": (c.d_model, c.d_ff),
                expert + "w3.weight": (c.d_ff, c.d_model),
            }
    return {key: random_bits(rng, shape, dtype) for key, shape in shapes.items()}


def fused(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The same model in Hugging Face's fused keys."""
    out = {key: value for key, value in tensors.items() if "block_sparse_moe" not in key}
    for n in range(config.num_layers):
        old, new = f"model.layers.{n}.block_sparse_moe.", f"model.layers.{n}.mlp."
        experts = [[tensors[f"{old}experts.{e}.w{i}.weight"] for i in (1, 2, 3)] for e in range(config.num_experts)]
        out[new + "gate.weight"] = tensors[old + "gate.weight"]
        out[new + "experts.gate_up_proj"] = np.stack([np.concatenate([w1, w3]) for w1, _, w3 in experts])
        out[new + "experts.down_proj"] = np.stack([w2 for _, w2, _ in experts])
    return out


def pairs(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Halves to neighbours, head by head: Mistral's row 2j + h is Hugging Face's row h * head_dim / 2 + j."""
    half = config.head_dim // 2
    out = np.empty_like(rows)
    for head in range(0, len(rows), config.head_dim):
        for j in range(half):
            for h in (0, 1):
                out[head + 2 * j + h] = rows[head + h * half + j]
    return out


def mistral(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The same model in Mistral's keys."""
    ends = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    out = {f"{new}.weight": tensors[f"{old}.weight"] for old, new in ends.items()}
    inner = {
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe.gate": "feed_forward.gate",
    }
    for n in range(config.num_layers):
        old, new = f"model.layers.{n}.", f"layers.{n}."
        out |= {f"{new}{b}.weight": tensors[f"{old}{a}.weight"] for a, b in inner.items()}
        for letter in "qk":
            out[f"{new}attention.w{letter}.weight"] = pairs(tensors[f"{old}self_attn.{letter}_proj.weight"], config)
        for e in range(config.num_experts):
            for i in (1, 2, 3):
                key = f"experts.{e}.w{i}.weight"
                out[f"{new}feed_forward.{key}"] = tensors[f"{old}block_sparse_moe.{key}"]
    return out


def mistral_fused(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The same model in the keys of the first upload."""
    each = mistral(tensors, config)
    out = {key: value for key, value in each.items() if "feed_forward" not in key}
    for n in range(config.num_layers):
        old, new = f"layers.{n}.feed_forward.", f"layers.{n}.block_sparse_moe."
        out[new + "gate.weight"] = each[old + "gate.weight"]
        for i in (1, 2, 3):
            experts = [each[f"{old}experts.{e}.w{i}.weight"] for e in range(config.num_experts)]
            out[f"{new}w{i}"] = np.concatenate([w.T for w in experts] if i == 2 else experts)
    return out


def dense(tensors: Tensors, config: ModelConfig) -> Tensors:
    """A dense model out of expert 0, in Hugging Face's keys."""
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    out = {key: value for key, value in tensors.items() if "block_sparse_moe" not in key}
    for n in range(config.num_layers):
        for old, new in names.items():
            old_key = f"model.layers.{n}.block_sparse_moe.experts.0.{old}.weight"
            out[f"model.layers.{n}.mlp.{new}.weight"] = tensors[old_key]
    return out


def mistral_dense(tensors: Tensors, config: ModelConfig) -> Tensors:
    """A dense model out of expert 0, in Mistral's keys."""
    each = mistral(tensors, config)
    out = {key: value for key, value in each.items() if "feed_forward" not in key}
    for n in range(config.num_layers):
        for i in (1, 2, 3):
            out[f"layers.{n}.feed_forward.w{i}.weight"] = each[f"layers.{n}.feed_forward.experts.0.w{i}.weight"]
    return out


def config_json(config: ModelConfig) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": 32768,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }


def params_json(config: ModelConfig) -> dict[str, Any]:
    """As Mistral writes it."""
    return {
        "dim": config.d_model,
        "n_layers": config.num_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.d_ff,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "moe": {"num_experts_per_tok": config.num_experts_per_tok, "num_experts": config.num_experts},
    }


def first_upload_json(config: ModelConfig) -> dict[str, Any]:
    """As the first upload had it: the hub's names and a string."""
    taken = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
             "num_local_experts", "rms_norm_eps", "rope_theta", "vocab_size")  # fmt: skip
    own = {key: value for key, value in config_json(config).items() if key in taken}
    return {**own, "num_experts_per_token": config.num_experts_per_tok, "sliding_window": "4096"}


LAYOUTS = {"hf": lambda tensors, config: tensors, "hf-fused": fused, "mistral": mistral, "mistral-fused": mistral_fused,
           "hf-dense": dense, "mistral-dense": mistral_dense}  # fmt: skip


def write(directory: Path, name: str, tensors: Tensors, config: ModelConfig, dtype: FileType) -> Path:
    """Writes a checkpoint in a format, as the releases split it; `tensors` are in classic keys."""
    directory.mkdir()
    laid_out = LAYOUTS[name](tensors, config)
    if name.startswith("hf"):
        keys = sorted(laid_out)
        files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        for i, file in enumerate(files):
            save_file({key: laid_out[key] for key in keys[i::3]}, directory / file)
        index = {"weight_map": {key: files[i % 3] for i, key in enumerate(keys)}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        description = config_json(config)
    elif name == "mistral-fused":
        parts: list[Tensors] = [{}, {}]
        for key, value in laid_out.items():
            parts[key.startswith(f"layers.{config.num_layers - 1}")][key] = value
        for number, part in enumerate(parts):
            save_torch(part, directory / f"consolidated.0{number}.pt", dtype)
        description = first_upload_json(config)
    elif name == "mistral":
        save_file(laid_out, directory / "consolidated.safetensors")
        description = params_json(config)
    else:
        save_torch(laid_out, directory / "consolidated.00.pth", dtype)
        description = params_json(config)
    if "dense" in name:
        description = {key: value for key, value in description.items() if "expert" not in key and key != "moe"}
        description |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]} if name == "hf-dense" else {}
    file = directory / ("config.json" if name.startswith("hf") else "params.json")
    file.write_text(json.dumps(description))
    return directory


def save_torch(tensors: Tensors, file: Path, dtype: FileType) -> None:
    """Writes a zip checkpoint; its writer is held against PyTorch in the parity tests."""
    with TorchWriter(file, {key: value.shape for key, value in tensors.items()}, dtype) as writer:
        for key, value in tensors.items():
            writer.write(key, [value.view(f"u{value.itemsize}")])


def load(directory: Path) -> Tensors:
    """Reads all tensors of a directory."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(directory.glob("*.pt*")):
        tensors |= {key: np.array(t.open()).view(FILE_TYPES[t.dtype]) for key, t in read_torch(file).items()}
    return tensors
