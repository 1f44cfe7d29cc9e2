"""Arrays between devices and a checkpoint's files, block by block: the host holds a few of them, however large
the model.

Orbax moves whole arrays, and a model with stacked layers has but a dozen, each a large part of it. So Orbax writes
arrays of one byte, and tensorstore, on which it is built, puts the true ones in their places, block by block. What
comes out is like any other checkpoint of Orbax, but not compressed, and any other can be read this way.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.typing import DTypeLike
from jaxtyping import PyTree, Shaped

BLOCK = 128 << 20  # bytes that move at once, if an array has leading axes to cut
CHUNK = 64 << 20  # bytes of one file

WRITES = 2  # blocks that are on the way to the files at once

Arrays = dict[str, jax.Array]
Abstract = dict[str, jax.ShapeDtypeStruct]
Start = tuple[int, ...]
Block = tuple[str, str, Start, np.ndarray]  # part and name of an array, where in it the values begin, and they


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Flattens a tree to {path: leaf}: what is stored does not depend on the classes that the tree is made of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in leaves}


def save_args(leaf: Any) -> ocp.SaveArgs:
    """Says how Orbax is to cut an array on disk, so that no chunk holds more than one block's part."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=tuple(range(_cut_axes(leaf.shape, leaf.dtype))))


def write_blocks(
    directory: Path, parts: Mapping[str, Arrays | Abstract], blocks: Iterable[Block], advance: Callable[[int], None]
) -> None:
    """Writes what Orbax would write, from one process; `write_manifest` sees to it that it is on the disk.

    Args:
        directory: created.
        parts: shapes and types of the arrays by name, of each item of the checkpoint.
        blocks: what fills them.
        advance: told of every block's bytes.

    Raises:
        OSError, ValueError: as Orbax and tensorstore do.
    """
    items = {
        part: ocp.args.StandardSave({name: np.zeros(1, np.uint8) for name in arrays}) for part, arrays in parts.items()
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(directory, args=ocp.args.Composite(**items))
    stores = {
        (part, name): _create(directory / part, name, leaf)
        for part, arrays in parts.items()
        for name, leaf in arrays.items()
    }
    under_way = deque[Any]()
    try:
        for part, name, start, block in blocks:
            store = stores[part, name]
            if len(under_way) == WRITES:  # these blocks are written while the next one comes
                under_way.popleft().result()
            place = _place(tuple(slice(size) for size in store.shape), start, block.shape)
            under_way.append(store[place].write(block, can_reference_source_data_indefinitely=True))
            advance(block.nbytes)
        while under_way:
            under_way.popleft().result()
    finally:
        for write in under_way:
            write.commit.exception()  # nobody writes on after an error


def joined(blocks: Iterable[Block], parts: Mapping[str, Arrays | Abstract]) -> Iterator[Block]:
    """Joins small blocks to large ones, for whoever writes a part of a file writes all of it again.

    Args:
        blocks: those of one large block come soon after each other.
        parts: shapes and types of the arrays by name, of each item of the checkpoint.

    Yields:
        Blocks of at least the size that `blocks_of` gives.
    """
    begun: dict[tuple[str, str, Start], tuple[np.ndarray, list[int]]] = {}
    for part, name, start, block in blocks:
        leaf = parts[part][name]
        cut = _cut_axes(leaf.shape, leaf.dtype)
        shape, first = (*[1] * cut, *leaf.shape[cut:]), (*start[:cut], *[0] * (len(start) - cut))
        if block.size >= math.prod(shape):
            yield part, name, start, block
            continue
        whole, missing = begun.setdefault((part, name, first), (np.empty(shape, leaf.dtype), [math.prod(shape)]))
        inside = (*[0] * cut, *start[cut:])
        whole[_place(tuple(slice(size) for size in shape), inside, block.shape)] = block
        missing[0] -= block.size
        if not missing[0]:
            del begun[part, name, first]
            yield part, name, first, whole
    assert not begun


def blocks_of(parts: Mapping[str, Arrays]) -> Iterator[Block]:
    """Takes arrays from this process's devices, block by block."""
    for part, arrays in parts.items():
        for name, leaf in arrays.items():
            for shard in leaf.addressable_shards:
                if shard.replica_id:
                    continue
                for start, shape in _blocks(shard.data.shape, leaf.dtype):
                    place = _place(shard.index, start, shape)
                    yield part, name, tuple(at.start for at in place), np.asarray(_take(shard.data, start, shape))


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
    return {name: _read(_open(directory, name), leaf, advance) for name, leaf in abstract.items()}


def _read(store: ts.TensorStore, leaf: jax.ShapeDtypeStruct, advance: Callable[[int], None]) -> jax.Array:
    assert leaf.sharding is not None
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        index = tuple(slice(*ends) for ends in bounds)
        shape = tuple(end - begin for begin, end in bounds)
        filled = [jnp.zeros(shape, leaf.dtype, device=device) for device in devices]
        blocks = list(_blocks(shape, leaf.dtype))
        reads = (store[_place(index, *block)].read() for block in blocks)
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
    store = _open(directory, name)
    whole = tuple(slice(size) for size in store.shape)
    for block in itertools.islice(_blocks(store.shape, store.dtype.numpy_dtype), first, None, every):
        yield store[_place(whole, *block)].read().result()


def num_blocks(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Counts the blocks of an array."""
    return math.prod(shape[: _cut_axes(shape, dtype)])


def _cut_axes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Counts the leading axes along which an array is cut to single entries, so that the rest is at most a block."""
    itemsize, most = np.dtype(dtype).itemsize, max(0, len(shape) - 2)  # a matrix is never cut
    return next((axis for axis in range(most) if math.prod(shape[axis:]) * itemsize <= BLOCK), most)


def _blocks(shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[tuple[Start, tuple[int, ...]]]:
    """Lists where the blocks of an array begin, and their shape."""
    axes = _cut_axes(shape, dtype)
    for lead in np.ndindex(*shape[:axes]):
        yield (*lead, *[0] * (len(shape) - axes)), (*[1] * axes, *shape[axes:])


def _place(index: tuple[slice, ...], start: Start, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a block of the part `index` of an array lies in the whole."""
    begins = [(part.start or 0) + offset for part, offset in zip(index, start, strict=True)]
    return tuple(slice(begin, begin + size) for begin, size in zip(begins, shape, strict=True))


@partial(jax.jit, static_argnames="shape")
def _take(whole: jax.Array, start: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(whole, start, shape)


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    """Writes a block in its place, its bits as they are: XLA for CPU would widen a whole array of bfloat16."""
    bits = jnp.dtype(f"u{whole.dtype.itemsize}")
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    return jax.lax.bitcast_convert_type(
        jax.lax.dynamic_update_slice(as_bits(whole), as_bits(block), start), whole.dtype
    )


def _open(directory: Path, name: str) -> ts.TensorStore:
    return ts.open(_spec(directory, name), open=True).result()


def _create(directory: Path, name: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> ts.TensorStore:
    """Puts an array in another one's place; weights hardly compress, and zstd takes longer than all the rest."""
    cut = _cut_axes(leaf.shape, leaf.dtype)
    lead, *rest = leaf.shape[cut:] or (1,)
    rows = max(1, min(lead, CHUNK // (math.prod(rest) * leaf.dtype.itemsize)))
    layout = ts.ChunkLayout(chunk_shape=(*[1] * cut, rows, *rest)[: leaf.ndim])
    uncompressed = {"metadata": {"compressor": None}, "context": {"file_io_sync": False}}
    return ts.open(
        _spec(directory, name) | uncompressed,
        create=True, delete_existing=True, dtype=leaf.dtype, shape=leaf.shape, chunk_layout=layout,
    ).result()  # fmt: skip


def _spec(directory: Path, name: str) -> dict[str, Any]:
    base = {"driver": "ocdbt", "base": f"file://{directory.absolute()}/", "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": base}
