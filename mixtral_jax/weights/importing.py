"""Streams a released checkpoint into sharded arrays."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import UserError
from mixtral_jax.model.mixtral import Architecture, Arrays
from mixtral_jax.runtime import Runtime
from mixtral_jax.weights.blocks import BlockLayout, block_layout, copy_turned, host_view, put_block
from mixtral_jax.weights.names import Row
from mixtral_jax.weights.progress import byte_progress
from mixtral_jax.weights.released import Released, Upcycling
from mixtral_jax.weights.stored import FILE_TYPES
from mixtral_jax.weights.upcycling import finish_upcycling

READERS = 2  # threads that read and turn blocks


def import_weights(released: Released, runtime: Runtime, upcycling: Upcycling | None = None) -> Arrays:
    """Reads every tensor into the model's sharded arrays; the host holds a few blocks at a time.

    Args:
        released: as opened and checked.
        runtime: mesh and parameter type; every process reads only what its devices need.
        upcycling: as given to `open_released`.

    Returns:
        {"params": ..., "selection_bias": ...}, the bias zero.

    Raises:
        UserError: a tensor with NaN or infinite values.
    """
    abstract = Architecture(released.config, runtime).abstract()
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract)
    itemsize = FILE_TYPES[released.dtype].itemsize
    total = itemsize * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract["params"]))
    with byte_progress(f"import {released.layout.name}", total) as advance:
        for row in released.layout.rows:
            *parents, name = row.path.split("/")
            holder = arrays["params"]
            for parent in parents:
                holder = holder[parent]
            # Popped, so that this function holds no second reference to what the first block's update donates.
            holder[name] = _fill(holder.pop(name), row, released, lambda count: advance(count * itemsize))
    return finish_upcycling(arrays, released.config, upcycling) if upcycling else arrays


def _fill(parameter: jax.Array, row: Row, released: Released, advance: Callable[[int], None]) -> jax.Array:
    """Reads one parameter, block by block."""
    assert isinstance(parameter.sharding, jax.sharding.NamedSharding)
    layout = block_layout(row, released.config, parameter.sharding)
    waiting: tuple[jax.Array, str] | None = None
    for (layer, expert), (block, where) in _read_ahead(row, released, layout):
        parameter, finite = put_block(parameter, block, layer, expert, layout=layout)
        if waiting:  # one block behind, so that reading goes on while devices work
            _require_finite(*waiting)
        waiting = finite, where
        advance(block.size)
    assert waiting
    _require_finite(*waiting)
    return parameter


def _read_ahead(
    row: Row, released: Released, layout: BlockLayout
) -> Iterator[tuple[tuple[int, int], tuple[jax.Array, str]]]:
    """Reads blocks in threads, one more than is asked for."""
    starts = list(layout.starts())
    with ThreadPoolExecutor(READERS) as pool:
        under_way = deque(pool.submit(_read_block, row, released, layout, *start) for start in starts[:READERS])
        for number, start in enumerate(starts):
            block = under_way.popleft().result()
            if number + READERS < len(starts):
                under_way.append(pool.submit(_read_block, row, released, layout, *starts[number + READERS]))
            yield start, block
            del block


def _require_finite(finite: jax.Array, where: str) -> None:
    if not finite:
        raise UserError(f"{where} holds NaN, or values too large for precision.params: copy the file again")


def _read_block(row: Row, released: Released, layout: BlockLayout, layer: int, expert: int) -> tuple[jax.Array, str]:
    """Reads a block, each device its part; also says which tensor it is for messages."""
    experts = range(expert, expert + layout.experts_per_block)
    stored = [released.tensors[row.key.format(layer=layer, expert=e)] for e in experts]
    kinds = {tensor.dtype for tensor in stored}
    dtype = FILE_TYPES[kinds.pop() if len(kinds) == 1 else "float32"]

    def read(index: Any) -> np.ndarray:
        """Copies a device's part out of the mapped files."""
        rest = index[1:] if layout.num_experts else index
        mine = range(layout.experts_per_block)[index[0]] if layout.num_experts else range(1)
        parts = []
        for e in mine:
            view = host_view(stored[e].open(), row, released.config, layout, experts[e])[rest]
            part = np.empty(view.shape, view.dtype)
            copy_turned(part, view)
            parts.append(part.view(FILE_TYPES[stored[e].dtype]).astype(dtype, copy=False))
        if not layout.num_experts:
            return parts[0]
        return parts[0][None] if len(parts) == 1 else np.stack(parts)

    block = jax.make_array_from_callback(layout.shape, layout.sharding, read)
    return block, f"tensor '{stored[0].key}' of {stored[0].file}"
