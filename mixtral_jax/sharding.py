"""The mesh and THE table from logical axes to mesh axes.

Parameters declare logical axes where they are created and activations where they are constrained; this table alone says
over which devices each is split.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixtral_jax.config import MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "d_model": ("fsdp", "expert"),
    "expert_d_model": ("fsdp",),  # of the experts' matrices, whose first axis takes `expert`
    "d_ff": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": (),
}

VOCAB_AXIS = "tensor"  # over which code that splits the vocabulary by hand communicates

Axes = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices along the five mesh axes.

    Args:
        config: size of each axis; one may be -1 and takes the rest.
        devices: what to arrange; default: all devices of all processes.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = max(1, len(devices) // known)
    if math.prod(sizes.values()) != len(devices):
        product = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {product} is {math.prod(sizes.values())} devices but there are {len(devices)}: "
            "change a mesh size, or set one to -1 to take the rest"
        )
    grid = np.array(devices).reshape([sizes[name] for name in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: Axes) -> PartitionSpec:
    """Looks up logical axes in the table.

    Raises:
        ValueError: an unknown axis, or two axes of one array on the same mesh axis.
    """
    entries = [() if axis is None else RULES[axis] if axis in RULES else _unknown(axis) for axis in axes]
    used = [name for entry in entries for name in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def _unknown(axis: str) -> tuple[str, ...]:
    raise ValueError(f"unknown logical axis '{axis}': the table has {', '.join(RULES)}")


def named_sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    """Returns the sharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, mesh: Mesh, axes: Axes) -> jax.Array:
    """Pins an activation to the table's sharding inside a jitted function."""
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, axes))


def gather(x: jax.Array, mesh: Mesh, logical: str, axis: int) -> jax.Array:
    """Inside `shard_map`: joins the parts of a parameter along its split axis.

    Written out, the gradient goes back as a reduce-scatter. Left to the compiler (a parameter that enters `shard_map`
    whole), it was summed whole on every device and cut afterwards: twice the bytes.

    Args:
        x: this device's part.
        mesh: the devices.
        logical: what the axis is called in the table.
        axis: its place in `x`.
    """
    names = tuple(name for name in RULES[logical] if mesh.shape[name] > 1)
    return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def axis_size(mesh: Mesh, logical: str) -> int:
    """Returns over how many devices a logical axis is split."""
    return math.prod(mesh.shape[name] for name in RULES[logical])
