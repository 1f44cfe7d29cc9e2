"""Streams a released checkpoint into one of this package's, block by block, without the devices."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from mixtral_jax.config import UserError
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.runs.streaming import Block, named_leaves
from mixtral_jax.weights.blocks import BlockLayout, block_layout, host_view
from mixtral_jax.weights.names import Row
from mixtral_jax.weights.released import Released, Upcycling
from mixtral_jax.weights.stored import FILE_TYPES
from mixtral_jax.weights.upcycling import add_noise, draw_router

READERS = 2  # threads that read and turn blocks


def import_weights(released: Released, abstract: Arrays, upcycling: Upcycling | None = None) -> Iterator[Block]:
    """Reads every tensor; the host holds a few blocks at a time.

    Args:
        released: as opened and checked.
        abstract: {"params": ..., "selection_bias": ...}, shapes and types.
        upcycling: as given to `open_released`.

    Yields:
        What fills the arrays; the bias is zero.

    Raises:
        UserError: a tensor with NaN or infinite values.
    """
    params = named_leaves(abstract["params"])
    whole = NamedSharding(jax.make_mesh((1,), ("host",), devices=jax.local_devices()[:1]), PartitionSpec())
    work = []
    for row in released.layout.rows:
        layout = block_layout(row, released.config, whole)
        work += [
            partial(_read, row, released, layout, *at, params[row.path].dtype, upcycling) for at in layout.starts()
        ]
    with ThreadPoolExecutor(READERS) as pool:
        under_way = deque(pool.submit(task) for task in work[:READERS])
        for task in [*work[READERS:], *[None] * READERS]:
            block = under_way.popleft().result()
            if task:
                under_way.append(pool.submit(task))
            yield block
            del block
    if upcycling:
        router = params["layers/moe/router"]
        values = draw_router(router.shape, released.config, upcycling.seed)
        yield "params", "layers/moe/router", (0,) * len(router.shape), np.asarray(values.astype(router.dtype))
    for name, leaf in named_leaves(abstract["selection_bias"]).items():
        yield "selection_bias", name, (0,) * len(leaf.shape), np.zeros(leaf.shape, leaf.dtype)


def _read(
    row: Row, released: Released, layout: BlockLayout, layer: int, expert: int, dtype: Any, upcycling: Upcycling | None
) -> Block:
    """Reads a block into the order and type of its parameter."""
    stored = released.tensors[row.key.format(layer=layer, expert=expert)]
    view = host_view(stored.open(), row, released.config, layout, expert)
    # XLA turns it, several times as fast as numpy.
    values = np.asarray(jax.device_put(view)).view(FILE_TYPES[stored.dtype]).astype(dtype, copy=False)
    if upcycling and upcycling.noise and layout.num_experts:
        values = np.asarray(add_noise(values, row.path, layer, expert, upcycling))
    if not _all_finite(values):
        where = f"tensor '{stored.key}' of {stored.file}"
        raise UserError(f"{where} holds NaN, or values too large for precision.params: copy the file again")
    return "params", row.path, tuple(layout.start_of(layer, expert)), values.reshape(layout.ours_shape)


def _all_finite(values: Shaped[np.ndarray, "..."]) -> bool:
    """Says whether all values are finite; the bits of those that are not are the largest of either sign."""
    infinite = np.array([np.inf, -np.inf], values.dtype)
    signed, unsigned = (f"{kind}{values.dtype.itemsize}" for kind in "iu")
    return bool(
        values.view(signed).max() < infinite.view(signed)[0]
        and values.view(unsigned).max() < infinite.view(unsigned)[1]
    )
