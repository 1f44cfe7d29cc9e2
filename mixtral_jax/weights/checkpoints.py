"""Between released checkpoints and this package's own: what the verbs `import` and `export` do."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import jax
import yaml

from mixtral_jax.config import TRAINED, CheckpointConfig, Config, MeshConfig, UserError
from mixtral_jax.config_loading import parse_config, replace, to_yaml
from mixtral_jax.data.record import FILE as RECORD
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.runs.restoring import ADAPTERS, stored_model, with_adapters
from mixtral_jax.runs.sources import Source
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import ANY_MESH, make_mesh
from mixtral_jax.weights.destination import check_new, check_target, new_directory
from mixtral_jax.weights.exporting import About, export_weights
from mixtral_jax.weights.importing import ReleasedArrays
from mixtral_jax.weights.names import FormatName
from mixtral_jax.weights.peft_files import export_peft
from mixtral_jax.weights.progress import byte_progress
from mixtral_jax.weights.released import Released, Upcycling, open_released
from mixtral_jax.weights.released_config import SPELLINGS
from mixtral_jax.weights.released_tokenizer import read_tokenizer
from mixtral_jax.weights.stored import FileType

ROW = 4096  # tokens of a row in an import's configuration, if the model is meant for so many


def import_checkpoint(
    source: Path,
    directory: Path,
    overrides: list[str],
    upcycling: Upcycling | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Turns a released checkpoint into one that train.py (`init_from`) and eval.py take.

    Args:
        source: directory of the release.
        directory: gets `checkpoints/0`; must not exist or be empty.
        overrides: `section.key=value` for the checkpoint's configuration, such as precision.params=bfloat16.
        upcycling: makes a mixture of a dense model.
        say: told what was found and written.

    Raises:
        UserError: anything that does not fit, before anything is written.
    """
    check_new(directory)
    released = open_released(source, upcycling)
    config = _configuration(released, overrides)
    tokenizer = _tokenizer(released, config, overrides)
    say(f"{source}: {released.layout.name} format, {released.dtype}, {released.nbytes / 1e9:.2f} GB")
    for note in (*released.notes, *_notes(released, config, tokenizer)):
        say(note)
    with new_directory(directory) as partial:
        arrays = _without_devices(config).abstract()
        kept = ("dtype", "context", "eos_token_id")
        facts = {"format": released.layout.name, **{name: getattr(released, name) for name in kept}}
        meta = {"step": 0, "config": to_yaml(config), "data_fingerprint": "", "released": facts}
        checkpoints = Checkpoints(partial / "checkpoints", CheckpointConfig(), warn=say)
        files = {"tokenizer.model": tokenizer.model_bytes}
        values = ReleasedArrays(released, arrays, upcycling)
        with byte_progress(f"import {released.layout.name}", _size(arrays)) as advance:
            checkpoints.save_streamed(0, values, meta, files, advance)


def _without_devices(config: Config) -> Architecture:
    """The architecture as shapes and types alone: what is only copied fits no mesh and needs none."""
    return Architecture(config.model, make_runtime(config, make_mesh(MeshConfig(), jax.local_devices()[:1])))


def _configuration(released: Released, overrides: list[str]) -> Config:
    """Writes the configuration of an import: the model is the release's, the rest the defaults."""
    model = {field: getattr(released.config, field) for field in (*SPELLINGS, "rope_scaling")}
    base = {
        "model": {**model, "rope_scaling": dataclasses.asdict(released.config.rope_scaling)},
        "data": {"seq_len": min(released.context or ROW, ROW)},
        "train": {"steps": 1, "batch_size": 8},  # a continuation has its own
    }
    config = parse_config(yaml.safe_dump(base), overrides, where=f"the configuration of {released.directory}")
    changed = [field for field in model if getattr(config.model, field) != model[field]]
    if changed:
        raise UserError(f"model.{changed[0]} belongs to the release, where it is {model[changed[0]]}: leave it out")
    if released.window and config.data.seq_len > released.window:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is longer than the release's sliding_window={released.window}, which "
            "is not computed here: lower it, or make the window null in the configuration if the model has none"
        )
    return config


def _size(arrays: Any) -> int:
    """Adds up the bytes of a tree of arrays, there or abstract."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _tokenizer(released: Released, config: Config, overrides: list[str]) -> Tokenizer:
    named = None
    if any(override.startswith("data.tokenizer=") for override in overrides):
        if config.data.tokenizer in TRAINED:
            raise UserError(
                f"data.tokenizer={config.data.tokenizer} would give the release's rows other meanings: name a "
                "sentencepiece file, mixtral or mixtral-v3, or leave it out"
            )
        named = load_tokenizer(config.data, sys.maxsize)  # whether it fits is said in an import's own words
    return read_tokenizer(released.directory, config.model.vocab_size, named)


def _notes(released: Released, config: Config, tokenizer: Tokenizer) -> Iterator[str]:
    """Says what an import makes of the release beyond a copy."""
    rows, tokens, added = config.model.vocab_size, tokenizer.vocab_size, len(tokenizer.added_tokens)
    if added or tokens < rows:
        behind = f", {rows - tokens} rows without a token" if tokens < rows else ""
        yield f"tokenizer: {tokens - added} pieces, {added} added tokens{behind}"
    if released.dtype != config.precision.params == "bfloat16":
        yield f"precision.params=bfloat16 rounds numbers of {released.dtype} by up to 0.4%; float32 would keep them"


def export_checkpoint(
    source: Path,
    directory: Path,
    format_name: FormatName | Literal["checkpoint", "peft"],
    *,
    dtype: FileType | Literal["q8_0"] | None = None,
    context: int | None = None,
    init_from: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Writes a run's newest checkpoint, or the named one, as a release; adapters are merged into their base first.

    Args:
        source: a run directory or one of its checkpoints.
        directory: created; must not exist or be empty. Of the format gguf a file, which must not exist.
        format_name: of the release; `checkpoint`: one of this package with the model alone; `peft`: adapters alone.
        dtype: of the tensors, q8_0 in gguf alone; None: that of the release if the checkpoint is an import, else the
            parameters' own.
        context: for how long sequences the model is meant, in tokens; None: as the release says, or data.seq_len.
        init_from: where the base of adapters lies, if not where it was.
        say: told what was found and written.

    Raises:
        UserError: no checkpoint there, or one that the format cannot hold.
    """
    check_target(directory, format_name, dtype)
    checkpoints, step = find_checkpoint(source, warn=say)
    meta = checkpoints.read_meta(step)
    config = parse_config(meta["config"], [ANY_MESH], where=f"the configuration in {source}", saved=True)
    say(f"{source}: step {step}")
    architecture = _without_devices(config)
    if format_name == "peft":
        if ADAPTERS not in meta:
            raise UserError(f"{source} holds no adapters: use --format hf")
        own = with_adapters(checkpoints, step, architecture)
        files = export_peft(checkpoints.stored(step, own.stored()), config.model, own.objective, directory)
        say(f"{directory}: adapters of {meta[ADAPTERS]['base']}, {len(files)} files")
        return
    values = stored_model(checkpoints, step, architecture, init_from)
    if format_name == "checkpoint":
        _save_model(values, checkpoints, step, config, directory)
        say(f"{directory}: a checkpoint for eval.py, or for train.py with init_from={directory}")
        return
    facts = meta.get("released", {})
    context = context or facts.get("context") or config.data.seq_len
    dtype = dtype or facts.get("dtype")
    tokenizer = checkpoints.read_file(step, "tokenizer.model")
    if format_name == "gguf":
        from mixtral_jax.weights.gguf_files import export_gguf

        written = [export_gguf(values, config.model, directory, context=context, dtype=dtype, tokenizer=tokenizer)]
    else:
        about = About(context, config.losses.load_balance, tokenizer, facts.get("eos_token_id"))
        kind = cast(FileType | None, dtype)
        written = export_weights(values, config.model, directory, format_name, about, dtype=kind)
    say(f"{directory}: {len(written)} files, {sum(file.stat().st_size for file in written) / 1e9:.2f} GB")


def _save_model(values: Source, checkpoints: Checkpoints, step: int, config: Config, directory: Path) -> None:
    """Writes a model alone as a checkpoint that says of its training what the one that it is made of says."""
    facts = {name: value for name, value in checkpoints.read_meta(step).items() if name not in (ADAPTERS, "arrays")}
    meta = {**facts, "config": to_yaml(replace(config, objective={"lora_rank": 0, "lora_router": False}))}
    names = ("tokenizer.model", *([RECORD] if "documents" in meta else []))
    files = {name: checkpoints.read_file(step, name) for name in names}
    with new_directory(directory) as partial, byte_progress("write the checkpoint", _size(values.parts)) as advance:
        alone = Checkpoints(partial / "checkpoints", CheckpointConfig())
        alone.save_streamed(step, values, meta, files, advance)
