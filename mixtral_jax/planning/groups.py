"""Which devices a collective joins: the notations of replica groups, and their mesh axes."""

import math
import re

import numpy as np
from jax.sharding import Mesh

from mixtral_jax.planning.hlo import Instruction

IOTA = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"


def participants(instruction: Instruction, num_devices: int) -> list[list[int]]:
    """Lists the groups of devices, by their place in the mesh, that a collective operation joins.

    Args:
        instruction: the operation; three notations of `replica_groups` and `source_target_pairs` are read.
        num_devices: of the whole program.

    Returns:
        One list a group; of a permute one list a pair.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{([\d,{} ]*)\}", text)
    if pairs:
        return _lists(pairs[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]+\))?)\))? \{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.search(rf"replica_groups={IOTA}", text)
    if iota:
        return _iota(*iota.groups()).tolist()
    listed = re.search(r"replica_groups=\{([\d,{} ]*)\}", text)
    if listed is None:
        raise ValueError(f"cannot read the replica groups of {instruction.name}: {text[:200]}")
    return _lists(listed[1]) or [list(range(num_devices))]


def axes_of(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which the members of a group differ."""
    shape = tuple(mesh.shape.values())
    varying = np.zeros(len(shape), bool)
    for group in groups:
        coordinates = np.array(np.unravel_index(group, shape))
        varying |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(name for name, varies in zip(mesh.axis_names, varying, strict=True) if varies)


def _integers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]


def _iota(shape: str, dims: str, order: str | None) -> np.ndarray:
    """`[8,2]<=[4,4]T(1,0)`: counts through [4,4], transposes, and reshapes to [8,2]."""
    sizes = _integers(dims)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_integers(order) if order else None or range(len(sizes))).reshape(_integers(shape))


def _mesh_groups(sizes: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """`mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'b'}`: groups along the named axes, or parts `'a':(2)4` of them."""
    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    shape = {name: int(size) for name, size in names}
    ids = np.arange(math.prod(shape.values()))
    if device_ids:
        dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids.strip()).groups()  # type: ignore[union-attr]
        ids = _iota(str(ids.size), dims, order)
    used = [
        (name, int(pre or 1), int(size or 0)) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    ]
    parts: list[int] = []
    grouped: list[int] = []
    for name, size in shape.items():
        cuts = sorted((pre, part or size) for used_name, pre, part in used if used_name == name)
        done = 1
        for pre, part in cuts:
            if pre > done:
                parts.append(pre // done)
            grouped.append(len(parts))
            parts.append(part)
            done = pre * part
        parts.append(size // done)
    kept = [axis for axis in range(len(parts)) if axis not in grouped]
    count = math.prod(parts[axis] for axis in grouped)
    return ids.reshape(parts).transpose(kept + grouped).reshape(-1, count).tolist()
