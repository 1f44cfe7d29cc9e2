"""Blocks: the pieces in which parameters travel between files and devices.

A block is one layer of a parameter, and one expert of it where the mesh does not split the experts. On the way it has
the order of axes of the parameter: the host turns what it copies anyway, devices cast, each its own part.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Num, Shaped

from mixtral_jax.config import ModelConfig
from mixtral_jax.weights.names import OURS, Row, atoms, axis_sizes


@dataclass(frozen=True)
class BlockLayout:
    """How the blocks of a parameter lie in a file and on the devices."""

    order: tuple[int, ...]  # of the axes that a file's view has (experts in front), as a block has them
    shape: tuple[int, ...]  # of a block
    ours_shape: tuple[int, ...]  # the same with axes as long as the parameter's, the leading ones 1
    sharding: NamedSharding  # of a block: every device has what it needs for its parameter
    num_layers: int  # 0: the parameter is outside of the layers
    num_experts: int  # 0: the parameter does not have one matrix an expert
    experts_per_block: int

    def starts(self) -> Iterator[tuple[int, int]]:
        """Lists layer and first expert of every block."""
        for layer in range(self.num_layers or 1):
            for expert in range(0, self.num_experts or 1, self.experts_per_block):
                yield layer, expert

    def start_of(self, layer: Any, expert: Any) -> list[Any]:
        """Returns where a block begins in the parameter."""
        lead = [layer] * bool(self.num_layers) + [expert] * bool(self.num_experts)
        return lead + [0] * (len(self.ours_shape) - len(lead))


def block_layout(row: Row, config: ModelConfig, sharding: NamedSharding) -> BlockLayout:
    """Derives the blocks of a row's parameter from the tables and from how the parameter is spread."""
    sizes = axis_sizes(config)
    names = atoms(OURS[row.path])
    mesh_axes = dict(zip(names, (*sharding.spec, *[None] * len(names)), strict=False))
    in_layers, per_expert = names[0] == "layers", names[1:2] == ["experts"]
    sizes["experts_per_block"] = config.num_experts
    if per_expert and _parts(sharding, mesh_axes["experts"]) == 1:
        sizes["experts_per_block"] = 1
    rename = {"experts": "experts_per_block"} if per_expert else {}

    theirs = [axis for axis in atoms(row.axes) if axis != "part" and not (per_expert and axis == "experts")]
    theirs = ["experts"] * per_expert + theirs
    rotary = {"head_dim": ["pair", "half"]} if "half" in theirs else {}
    ours = [part for axis in names[in_layers:] for part in rotary.get(axis, [axis])]
    assert sorted(ours) == sorted(theirs), row
    return BlockLayout(
        order=tuple(theirs.index(axis) for axis in ours),
        shape=tuple(sizes[rename.get(axis, axis)] for axis in ours),
        ours_shape=(*[1] * in_layers, *(sizes[rename.get(axis, axis)] for axis in names[in_layers:])),
        sharding=NamedSharding(sharding.mesh, PartitionSpec(*(mesh_axes.get(axis) for axis in ours))),
        num_layers=config.num_layers * in_layers,
        num_experts=config.num_experts * per_expert,
        experts_per_block=sizes["experts_per_block"] if per_expert else 1,
    )


def _parts(sharding: NamedSharding, entry: Any) -> int:
    """Counts over how many devices one entry of a partition splits its axis."""
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def host_view(
    tensor: Shaped[np.ndarray, "..."], row: Row, config: ModelConfig, layout: BlockLayout, expert: int
) -> Shaped[np.ndarray, "..."]:
    """Views an external tensor's part for one expert in the order of a block's axes (after its axis of experts)."""
    sizes, names = axis_sizes(config), atoms(row.axes)
    picked: dict[str, Any] = {"part": row.part, **({"experts": expert} if layout.num_experts else {})}
    view = tensor.reshape([sizes[axis] for axis in names])[tuple(picked.get(axis, slice(None)) for axis in names)]
    # The experts are in front of both.
    return view.transpose([axis - 1 for axis in layout.order[1:]] if layout.num_experts else layout.order)


def copy_turned(target: Shaped[np.ndarray, "..."], source: Shaped[np.ndarray, "..."]) -> None:
    """Copies between arrays whose axes may lie in memory in other orders; XLA turns them, faster than numpy."""
    order = np.argsort(target.strides)[::-1]
    target.transpose(order)[...] = np.asarray(jax.device_put(source.transpose(order)))


@partial(jax.jit, static_argnames=("layout", "dtype"))
def take_block(
    parameter: Num[Array, "..."], layer: Any, expert: Any, *, layout: BlockLayout, dtype: DTypeLike
) -> tuple[Num[Array, "..."], Bool[Array, ""]]:
    """Reads a block from its place, in the file's type; says whether it is finite there."""
    block = jax.lax.dynamic_slice(parameter, layout.start_of(layer, expert), layout.ours_shape)
    block = block.reshape(layout.shape).astype(dtype)
    return jax.lax.with_sharding_constraint(block, layout.sharding), jnp.isfinite(block).all()
