"""The mesh and THE table from logical axes to mesh axes.

Parameters declare logical axes where they are created and activations where they are constrained; this table alone says
over which devices each is split.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from mixtral_jax.config import MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

ONE_DEVICE = PartitionSpec(MESH_AXES)

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

# An override for arrays that were trained on other devices than those at hand.
ANY_MESH = (
    "mesh={data: 1, fsdp: -1, expert: 1, context: 1, tensor: 1, "
    "dcn: {data: 0, fsdp: 0, expert: 0, context: 0, tensor: 0}}"
)

VOCAB_AXIS = "tensor"  # over which code that splits the vocabulary by hand communicates

Axes = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices along the five mesh axes; see `arrange_devices`.

    Args:
        config: size of each axis, and how many slices lie along it.
        devices: what to arrange; default: all devices of all processes.

    Raises:
        UserError: the sizes do not fit the devices, or there are none of the kind that JAX_PLATFORMS asks for.
    """
    try:
        found = jax.devices() if devices is None else devices
    except (RuntimeError, AssertionError) as error:  # JAX's own
        reason = (str(error).strip() or "there are none").splitlines()[0].partition(" (set JAX_PLATFORMS")[0]
        asked = jax.config.jax_platforms or "any platform"  # type: ignore[attr-defined]
        raise UserError(f"no devices of {asked}: {reason}; unset JAX_PLATFORMS, or fix the driver") from None
    grid = arrange_devices(config, found)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange_devices(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Arranges devices so that neighbours along an axis share a fast network as far as the configuration lets them.

    A slice is what one fast network joins: devices of equal `slice_index` (a TPU slice; on GPUs a node or a domain of
    NVLink); where devices have none, TPUs are one slice and others are joined by process. Along each axis the slices
    come outermost, and the devices of a slice follow its physical order.

    Args:
        config: size of each axis, of which one may be -1 and takes the rest; `dcn`: slices along each.
        devices: objects with the attributes of `jax.Device`.

    Returns:
        Devices by place along `MESH_AXES`.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or the slices do not divide over the axes.
    """
    sizes = axis_sizes(config, len(devices))
    by_process = getattr(devices[0], "slice_index", None) is None
    members = Counter(_slice_of(device) for device in devices)
    if len(members) == 1:
        return create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if len(set(members.values())) > 1:
        raise UserError(
            f"the {len(members)} slices have {min(members.values())} to {max(members.values())} devices: "
            "start on slices of equal size"
        )
    outer = _slices_by_axis(config, sizes, len(members))
    inner = [size // slices for size, slices in zip(sizes, outer, strict=True)]
    return create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _slice_of(device: Any) -> int:
    number = getattr(device, "slice_index", None)
    if number is None:
        return 0 if device.platform == "tpu" else device.process_index
    return number


def axis_sizes(config: MeshConfig, num_devices: int) -> list[int]:
    """Says the size of each of `MESH_AXES`, -1 replaced.

    Raises:
        UserError: they do not multiply to the number of devices.
    """
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: max(1, num_devices // known) if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        product = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {product} is {math.prod(sizes.values())} devices but there are {num_devices}: "
            "change a mesh size, or set one to -1 to take the rest"
        )
    return list(sizes.values())


def _slices_by_axis(config: MeshConfig, sizes: list[int], num_slices: int) -> list[int]:
    """How many slices lie along each axis: as `mesh.dcn` says, then over data, then over fsdp."""
    size_of = dict(zip(MESH_AXES, sizes, strict=True))
    slices = {name: getattr(config.dcn, name) for name in MESH_AXES}
    for name, count in slices.items():
        if count and size_of[name] % count:
            raise UserError(
                f"mesh.{name} is {size_of[name]} devices, not a multiple of mesh.dcn.{name}={count}: change one"
            )
    given = math.prod(count for count in slices.values() if count)
    left = num_slices // given if num_slices % given == 0 else 0
    for name in MESH_AXES:
        if not slices[name]:
            slices[name] = math.gcd(size_of[name], left) if left and name in ("data", "fsdp") else 1
            left //= slices[name]
    if left != 1:
        product = " * ".join(f"{name}={count}" for name, count in slices.items())
        raise UserError(
            f"the devices lie in {num_slices} slices (nodes), which do not divide over the mesh with mesh.dcn "
            f"{product}: make mesh.data or mesh.fsdp a multiple of {num_slices}, or say with mesh.dcn which axes cross "
            "slices"
        )
    return list(slices.values())


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


def constrain(x: Shaped[jax.Array, "..."], mesh: Mesh, axes: Axes) -> Shaped[jax.Array, "..."]:
    """Pins an activation to the table's sharding inside a jitted function."""
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, axes))


def by_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Makes a function of whole arrays of one of each device's parts: `shard_map`.

    Gradients of arguments are summed over mesh axes that their spec does not name, and XLA for CPU copies for a sum
    over one device too; so there every axis is named.
    """
    if mesh.size == 1:
        in_specs = jax.tree.map(lambda spec: ONE_DEVICE if len(spec) else spec, in_specs)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather(x: Shaped[jax.Array, "..."], mesh: Mesh, logical: str, axis: int) -> Shaped[jax.Array, "..."]:
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


def add_up(x: Shaped[jax.Array, "..."], mesh: Mesh, *names: str) -> Shaped[jax.Array, "..."]:
    """Inside `shard_map`: sums over mesh axes; XLA for CPU would copy for a sum over one device too."""
    names = tuple(name for name in names if mesh.shape[name] > 1)
    return jax.lax.psum(x, names) if names else x


def axis_size(mesh: Mesh, logical: str) -> int:
    """Returns over how many devices a logical axis is split."""
    return math.prod(mesh.shape[name] for name in RULES[logical])
