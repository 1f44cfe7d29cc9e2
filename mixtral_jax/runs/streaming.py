"""Arrays between devices and a checkpoint's files, block by block: the host holds a few of them, however large
the model.

Orbax moves whole arrays, and a model with stacked layers has but a dozen, each a large part of it. Tensorstore, on
which Orbax is built, moves any part of one; so what is written like this (`filling`) is like any other checkpoint of
Orbax, and any other can be read this way.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.typing import DTypeLike
from jaxtyping import PyTree, Shaped

BLOCK = 128 << 20  # bytes that move at once, if an array has leading axes to cut
CHUNK = 64 << 20  # bytes of one file
FINEST = 64  # an array is cut further only where what comes out is at least this part of a block

Start = tuple[int, ...]
T = TypeVar("T", ocp.Checkpointer, ocp.AsyncCheckpointer)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Flattens a tree to {path: leaf}: what is stored does not depend on the classes that the tree is made of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in leaves}


def orbax_writer(kind: type[T]) -> T:
    """Makes what saves, and renames nothing: a manifest tells what is finished, and renames can be trusted less."""
    in_place = ocp.path.atomicity.CommitFileTemporaryPath
    options = ocp.CompositeOptions(temporary_path_class=in_place)
    return kind(ocp.CompositeCheckpointHandler(composite_options=options), temporary_path_class=in_place)


def save_args(leaf: Any) -> ocp.SaveArgs:
    """Says how Orbax is to cut an array on disk, so that no chunk holds more than one block's part."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=tuple(range(cut_axes(leaf.shape, leaf.dtype))))


def read_arrays(
    directory: Path, abstract: dict[str, jax.ShapeDtypeStruct], advance: Callable[[int], None]
) -> dict[str, Shaped[jax.Array, "..."]]:
    """Reads arrays of one item of a checkpoint onto any devices; every process reads what its devices need.

    Args:
        directory: of the item.
        abstract: shapes, types and shardings by name, as they are in the checkpoint.
        advance: told of every block's bytes.

    Returns:
        The arrays by name.

    Raises:
        ValueError: as tensorstore does.
    """
    return {name: _read(open_array(directory, name), leaf, advance) for name, leaf in abstract.items()}


def _read(store: ts.TensorStore, leaf: jax.ShapeDtypeStruct, advance: Callable[[int], None]) -> jax.Array:
    assert leaf.sharding is not None
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        corner = tuple(begin for begin, _ in bounds)
        shape = tuple(end - begin for begin, end in bounds)
        filled = [jnp.zeros(shape, leaf.dtype, device=device) for device in devices]
        blocks = list(blocks_of(shape, leaf.dtype))
        reads = (store[place(start, size, corner)].read() for start, size in blocks)
        ahead = next(reads)
        for start, _ in blocks:
            block, ahead = ahead.result(), next(reads, ahead)
            placed = [jax.device_put(block, device) for device in devices]
            filled = [_put(whole, part, start) for whole, part in zip(filled, placed, strict=True)]
            jax.block_until_ready(filled)  # else blocks would pile up on the host
            advance(block.nbytes)
        shards += filled
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def read_blocks(directory: Path, name: str, first: int = 0, every: int = 1) -> Iterator[Shaped[np.ndarray, "..."]]:
    """Reads one array of an item of a checkpoint, a block at a time.

    Args:
        directory: of the item.
        name: of the array.
        first: block to begin with.
        every: how many blocks further the next one is, where others read those in between.

    Yields:
        Parts, in order, that together are the array.
    """
    store = open_array(directory, name)
    for block in itertools.islice(blocks_of(store.shape, store.dtype.numpy_dtype), first, None, every):
        yield store[place(*block)].read().result()


def num_blocks(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Counts the blocks of an array."""
    return math.prod(shape[: cut_axes(shape, dtype)])


def cut_axes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Counts the leading axes along which an array is cut to single entries, so that the rest is about a block."""
    itemsize, most = np.dtype(dtype).itemsize, max(0, len(shape) - 2)  # a matrix is never cut
    sizes = [math.prod(shape[axis:]) * itemsize for axis in range(most + 1)]
    cut = next((axis for axis, size in enumerate(sizes) if size <= BLOCK), most)
    return cut - 1 if cut and sizes[cut] * FINEST < BLOCK else cut


def chunk_shape(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[int, ...]:
    """Says what part of an array is one piece of a file, none of which lies in two blocks."""
    cut = cut_axes(shape, dtype)
    lead, *rest = shape[cut:] or (1,)
    rows = max(1, min(lead, CHUNK // (math.prod(rest) * np.dtype(dtype).itemsize)))
    return (*[1] * cut, rows, *rest)[: len(shape)]


def blocks_of(shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[tuple[Start, tuple[int, ...]]]:
    """Lists where the blocks of an array begin, and their shape."""
    axes = cut_axes(shape, dtype)
    for lead in np.ndindex(*shape[:axes]):
        yield (*lead, *[0] * (len(shape) - axes)), (*[1] * axes, *shape[axes:])


def place(start: Start, shape: tuple[int, ...], corner: Start | None = None) -> tuple[slice, ...]:
    """Where a block lies in an array; its start counts from a corner in there."""
    begins = [first + offset for first, offset in zip(corner or (0,) * len(start), start, strict=True)]
    return tuple(slice(begin, begin + size) for begin, size in zip(begins, shape, strict=True))


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    """Writes a block in its place, its bits as they are: XLA for CPU would widen a whole array of bfloat16."""
    bits = jnp.dtype(f"u{whole.dtype.itemsize}")
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    return jax.lax.bitcast_convert_type(
        jax.lax.dynamic_update_slice(as_bits(whole), as_bits(block), start), whole.dtype
    )


def open_array(directory: Path, name: str, context: ts.Context | None = None) -> ts.TensorStore:
    """Opens an array of one item of a checkpoint; `ValueError` where there is none."""
    return ts.open(array_spec(directory, name), open=True, context=context).result()


def array_spec(directory: Path, name: str) -> dict[str, Any]:
    """Says to tensorstore where an array of one item of a checkpoint lies."""
    return {"driver": "zarr", "kvstore": {**database_spec(directory), "path": f"{name}/"}}


def database_spec(directory: Path) -> dict[str, Any]:
    """Says to tensorstore what kind of database the files of one item of a checkpoint are."""
    return {"driver": "ocdbt", "base": f"file://{directory.absolute()}/"}
