"""Blocks: the pieces in which parameters travel between files.

A block is one layer of a parameter, and one expert of it if it has one matrix an expert. On the way to a file its axes
are turned to the order that they have there, and on the way back from there.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from mixtral_jax.config import ModelConfig
from mixtral_jax.runs.sources import host
from mixtral_jax.weights.names import OURS, Row, atoms, axis_sizes


@dataclass(frozen=True)
class BlockLayout:
    """How the blocks of a parameter lie in a file and in the parameter."""

    order: tuple[int, ...]  # of the axes that a file's view has, as a block has them
    shape: tuple[int, ...]  # of a block
    ours_shape: tuple[int, ...]  # the same with axes as long as the parameter's, the leading ones 1
    num_layers: int  # 0: the parameter is outside of the layers
    num_experts: int  # 0: the parameter does not have one matrix an expert

    @property
    def num_leads(self) -> int:
        """How many axes of the parameter are those of layers and experts."""
        return bool(self.num_layers) + bool(self.num_experts)

    def start_of(self, layer: int, expert: int) -> tuple[int, ...]:
        """Returns where a block begins in the parameter."""
        lead = [layer] * bool(self.num_layers) + [expert] * bool(self.num_experts)
        return (*lead, *[0] * (len(self.ours_shape) - len(lead)))

    def lead_of(self, place: tuple[int, ...]) -> tuple[int, int]:
        """Returns layer and expert of a block that begins somewhere in the parameter."""
        lead = iter(place)
        return next(lead) if self.num_layers else 0, next(lead) if self.num_experts else 0


def block_layout(row: Row, config: ModelConfig) -> BlockLayout:
    """Derives the blocks of a row's parameter from the tables."""
    sizes = axis_sizes(config)
    names = atoms(OURS[row.path])
    in_layers, per_expert = names[0] == "layers", names[1:2] == ["experts"]
    rest = names[in_layers + per_expert :]
    theirs = [axis for axis in atoms(row.axes) if axis != "part" and not (per_expert and axis == "experts")]
    rotary = {"head_dim": ["pair", "half"]} if "half" in theirs else {}
    ours = [part for axis in rest for part in rotary.get(axis, [axis])]
    assert sorted(ours) == sorted(theirs), row
    return BlockLayout(
        order=tuple(theirs.index(axis) for axis in ours),
        shape=tuple(sizes[axis] for axis in ours),
        ours_shape=(*[1] * (in_layers + per_expert), *(sizes[axis] for axis in rest)),
        num_layers=config.num_layers * in_layers,
        num_experts=config.num_experts * per_expert,
    )


def host_view(
    tensor: Shaped[np.ndarray, "..."], row: Row, config: ModelConfig, layout: BlockLayout, expert: int
) -> Shaped[np.ndarray, "..."]:
    """Views an external tensor's part for one expert in the order of a block's axes."""
    sizes, names = axis_sizes(config), atoms(row.axes)
    picked = {"part": row.part, **({"experts": expert} if layout.num_experts else {})}
    view = tensor.reshape([sizes[axis] for axis in names])[tuple(picked.get(axis, slice(None)) for axis in names)]
    return view.transpose(layout.order)


def file_view(block: Shaped[np.ndarray, "..."], layout: BlockLayout) -> Shaped[np.ndarray, "..."]:
    """Views a block in the order of a file's axes, in which it is one piece of its tensor."""
    return block.reshape(layout.shape).transpose(np.argsort(layout.order))


def turned(view: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Copies a view so that its last axis is the innermost in memory; XLA does it several times as fast as numpy."""
    return np.asarray(jax.device_put(view, host()))


def converted(values: Shaped[np.ndarray, "..."], dtype: DTypeLike) -> Shaped[np.ndarray, "..."]:
    """Rounds values to another type; those that it cannot hold become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def all_finite(values: Shaped[np.ndarray, "..."]) -> bool:
    """Says whether all values are finite; the bits of those that are not are the largest of either sign."""
    infinite = np.array([np.inf, -np.inf], values.dtype)
    signed, unsigned = (f"{kind}{values.dtype.itemsize}" for kind in "iu")
    return bool(
        values.view(signed).max() < infinite.view(signed)[0]
        and values.view(unsigned).max() < infinite.view(unsigned)[1]
    )
