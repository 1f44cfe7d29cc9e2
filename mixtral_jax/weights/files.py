"""Finds the files of a released checkpoint and gathers what their headers say."""

import json
import re
from pathlib import Path

from mixtral_jax.config import UserError
from mixtral_jax.weights.safetensors_files import read_safetensors
from mixtral_jax.weights.stored import StoredTensor
from mixtral_jax.weights.torch_files import read_torch

_SEARCHES = (
    ("config.json", ("model.safetensors", "model-*.safetensors")),
    ("params.json", ("consolidated*.safetensors",)),
    ("params.json", ("consolidated*.pth", "consolidated*.pt")),
)


def holds_release(directory: Path) -> bool:
    """Whether a directory is a release, perhaps an incomplete one: it has a configuration or tensors by their names."""
    return any(any(directory.glob(name)) for config_file, patterns in _SEARCHES for name in (config_file, *patterns))


def find_files(directory: Path) -> tuple[str, list[Path]]:
    """Returns the configuration file's name and the files of tensors.

    Hugging Face's files are preferred where a directory holds both kinds, and safetensors over PyTorch's.

    Raises:
        UserError: there are none.
    """
    for config_file, patterns in _SEARCHES:
        files = sorted(file for pattern in patterns for file in directory.glob(pattern))
        if files and (directory / config_file).is_file():
            return config_file, files
        if files:
            raise UserError(f"{directory} has {files[0].name} but no {config_file}: copy it from the release")
    raise UserError(
        f"{directory} holds no weights: expected config.json with model*.safetensors, or params.json with "
        "consolidated*.safetensors, .pth or .pt"
    )


def read_files(directory: Path, files: list[Path]) -> dict[str, StoredTensor]:
    """Reads the headers of files and holds them against each other and against the index.

    Raises:
        UserError: unreadable or missing file, or a tensor in two files, or another place than the index says.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            found = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}): check its permissions") from None
        for key, tensor in found.items():
            if key in tensors:
                raise UserError(f"tensor '{key}' is both in {tensors[key].file} and in {file}: remove the wrong file")
            tensors[key] = tensor
    _check_index(directory, files, tensors)
    return tensors


def _check_index(directory: Path, files: list[Path], tensors: dict[str, StoredTensor]) -> None:
    """Holds the files against *.safetensors.index.json, or against the count in their own names."""
    index = directory / (re.split(r"[-.]", files[0].name)[0] + ".safetensors.index.json")
    present = {file.name for file in files}
    if not index.is_file():
        for name in sorted(present):
            match = re.fullmatch(r".*-of-(\d+)\.safetensors", name)
            if match and len(present) != int(match[1]):
                raise UserError(f"{directory} has {len(present)} of {int(match[1])} files of tensors: copy the rest")
        return
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        ok = isinstance(where, dict) and all(isinstance(name, str) for name in where.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        ok = False
    if not ok:
        raise UserError(f"{index} is not an index of tensors: copy it from the release again")
    for key, name in where.items():
        if name not in present:
            raise UserError(f"{index} puts tensor '{key}' into {name}, which is missing: copy that file")
        if key not in tensors or tensors[key].file.name != name:
            raise UserError(f"{index} puts tensor '{key}' into {name}, which does not hold it: copy both again")
    for key, tensor in tensors.items():
        if key not in where:
            raise UserError(f"{tensor.file} holds tensor '{key}', which {index.name} does not name: remove it")
