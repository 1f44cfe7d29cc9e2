"""Opens a released checkpoint: finds its files, recognises its format and checks every tensor before any is read."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.weights.destination import check_release
from mixtral_jax.weights.files import find_files, read_files
from mixtral_jax.weights.names import FORMATS, ExternalTensor, Format, external_tensors, num_tensors
from mixtral_jax.weights.released_config import Description, read_description
from mixtral_jax.weights.stored import FileType, StoredTensor

DERIVED = (".rotary_emb.inv_freq", "rope.freqs")  # buffers of old files that follow from the configuration


@dataclass(frozen=True)
class Released:
    """A released checkpoint whose tensors were all found and checked, but not read."""

    directory: Path
    layout: Format
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    context: int | None  # tokens up to which the model here computes what the release does
    window: int | None = None  # tokens, where a sliding window is what bounds the context
    notes: tuple[str, ...] = ()  # what was left out, in sentences
    eos_token_id: int | list[int] | None = None  # what ends a generated text

    @property
    def dtype(self) -> FileType:
        """The type of all tensors, or float32 when they differ."""
        kinds = {tensor.dtype for tensor in self.tensors.values()}
        return kinds.pop() if len(kinds) == 1 else "float32"

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes a mixture. Source: arXiv 2212.05055."""

    num_experts: int  # copies of every feed-forward layer
    num_experts_per_tok: int = 2
    noise: float = 0.0  # added to the copies: a share of each matrix's standard deviation
    seed: int = 0  # of noise and routers


def open_released(directory: str | Path, upcycling: Upcycling | None = None) -> Released:
    """Opens a directory with a released Mixtral, or with a dense Mistral when `upcycling` is given.

    Only headers are read. Hugging Face's files are preferred where a directory holds both kinds.

    Raises:
        UserError: missing, extra, truncated or corrupt files; unknown, missing, duplicate or misshapen tensors;
            unreadable types; a configuration that does not fit.
    """
    directory = Path(directory)
    check_release(directory)
    config_file, files = find_files(directory)
    description = read_description(directory / config_file)
    found = read_files(directory, files)
    tensors = {key: tensor for key, tensor in found.items() if not key.endswith(DERIVED)}
    notes = []
    if len(tensors) < len(found):
        notes.append(
            f"{len(found) - len(tensors)} buffers of rotary frequencies are left out: the model computes its own"
        )
    layout = _recognise(tensors, directory, config_file)
    config = _model_config(description, layout, directory / config_file, upcycling)
    _check_tensors(tensors, layout, config, directory / config_file)
    if description.window:
        notes.append(
            f"{directory / config_file} has sliding_window={description.window}: the model here attends to everything, "
            f"so it computes what the release does in rows of up to {description.window} tokens"
        )
    context, window, eos = description.context, description.window, description.eos_token_id
    return Released(directory, layout, config, tensors, context, window, tuple(notes), eos)


def _recognise(tensors: dict[str, StoredTensor], directory: Path, config_file: str) -> Format:
    """Picks the format whose first feed-forward tensors are there."""
    candidates = [layout for layout in FORMATS.values() if layout.config_file == config_file]
    probes = {
        layout.name: next(row.key for row in layout.rows if row.path == "layers/moe/w_gate").format(layer=0, expert=0)
        for layout in candidates
    }
    for layout in candidates:
        if probes[layout.name] in tensors:
            return layout
    raise UserError(
        f"the tensors of {directory} are in no known format: none of {', '.join(probes.values())} is among them"
    )


def _model_config(description: Description, layout: Format, file: Path, upcycling: Upcycling | None) -> ModelConfig:
    if layout.dense and upcycling is None:
        raise UserError(
            f"{file.parent} is a dense model: give --upcycle-experts, such as 8, to make a mixture of its layers"
        )
    if not layout.dense and upcycling is not None:
        raise UserError(f"{file.parent} already is a mixture: leave out --upcycle-experts")
    if layout.dense != description.is_dense:
        kinds = ("dense", "a mixture")
        raise UserError(
            f"{file} says that the model is {kinds[not description.is_dense]} but its tensors are "
            f"{kinds[not layout.dense]}: copy both from one release"
        )
    fields = description.fields
    if upcycling is not None:
        k, experts = upcycling.num_experts_per_tok, upcycling.num_experts
        if not 1 <= k <= experts:
            raise UserError(f"--upcycle-experts {experts} must be at least the experts per token, {k}: raise it")
        if not 0 <= upcycling.noise < float("inf"):
            raise UserError(f"--upcycle-noise {upcycling.noise} must be 0 or more: a share of each matrix's spread")
        fields = {**fields, "num_experts": experts, "num_experts_per_tok": k}
    return ModelConfig(**fields, rope_scaling=description.rope_scaling)


def _check_tensors(tensors: dict[str, StoredTensor], layout: Format, config: ModelConfig, config_file: Path) -> None:
    """Accounts for every tensor: each expected one there and in shape, no other one."""
    missing = num_tensors(layout, config) - len(tensors)
    # No more than can matter: a configuration may ask for more layers than a machine can list.
    listed = itertools.islice(external_tensors(layout, config), len(tensors) + 1)
    expected: dict[str, ExternalTensor] = {entry.key: entry for entry in listed}
    if missing > 0:
        first = next(key for key in expected if key not in tensors)
        more = f" and {missing - 1} more" if missing > 1 else ""
        raise UserError(
            f"tensor '{first}'{more} of the {layout.name} format, which {config_file} asks for, is "
            "not in the files beside it: copy the missing files"
        )
    for key, tensor in tensors.items():
        if key not in expected:
            raise UserError(
                f"tensor '{key}' of {tensor.file} is not part of the {layout.name} format of the model in "
                f"{config_file}: remove it, or fix the configuration"
            )
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"tensor '{key}' of {tensor.file} has shape {list(tensor.shape)}, but {config_file} asks for "
                f"{list(expected[key].shape)}: copy both from one release"
            )
