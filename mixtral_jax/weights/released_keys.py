"""The keys of config.json and params.json: each is read, known to leave the output alone, or refused by name."""

import json
import reprlib
from pathlib import Path
from typing import Any

from mixtral_jax.config import UserError

# What these say must hold, for the model here computes nothing else. Every other key may be null, which is unset.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mixtral", "mistral", "transformer"),
    "hidden_act": ("silu",),
    "activation": ("silu",),
    "tie_word_embeddings": (False,),
    "tied_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_biases": (False,),
    "partial_rotary_factor": (1,),
    "causal": (True,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
# Bookkeeping, training and generation: nothing that a forward pass computes depends on them.
_HARMLESS = """
_attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path architectures
attention_dropout begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id dtype
finetuning_task id2label initializer_range label2id max_batch_size num_labels output_attentions
output_hidden_states output_router_logits pad_token_id prefix problem_type return_dict router_aux_loss_coef
router_jitter_noise sep_token_id task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
HARMLESS = frozenset(_HARMLESS.split())
# Of params.json, for which config.json has a key that is read.
IN_CONFIG_JSON = ("yarn",)


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object; `UserError` for a file that is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # also too many digits, too deep, not UTF-8
        raise UserError(f"cannot read {file} as JSON ({type(error).__name__}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: copy it from the release again")
    return content


def refuse_unknown(section: dict[str, Any], known: set[str], file: Path, prefix: str = "") -> None:
    """Accounts for every key of an object.

    Args:
        section: the object.
        known: keys that are read elsewhere.
        file: for messages.
        prefix: of the keys in messages.

    Raises:
        UserError: a key, or a value of a key, that is not known to leave the output as it is computed here.
    """
    for key, value in section.items():
        if value is None or key in known or key in HARMLESS or value in FIXED.get(key, ()):
            continue
        if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        only = f"only {FIXED[key][0]!r} can be imported" if key in FIXED else "no such feature can be imported"
        remedy = f"{only}; remove the key if it does not change what the model computes"
        if key in IN_CONFIG_JSON:
            remedy = "it is read from config.json, so import the release's files in Hugging Face's format"
        raise UserError(f"{file} has {prefix}{key}={reprlib.repr(value)}, which is not a Mixtral: {remedy}")


def number(value: Any, name: str, file: Path, *, whole: bool) -> Any:
    """Returns a number that is above 0, whole if asked for, and not absurdly large; `UserError` for anything else."""
    limit = 2**31 if whole else 1e30
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < limit:
        raise UserError(
            f"{name} of {file} is {reprlib.repr(value)}: it must be a {'whole ' * whole}number greater than 0 "
            f"and below {limit:g}"
        )
    return value
