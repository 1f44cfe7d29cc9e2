"""Where the numbers of a model come from, a block at a time: devices, or the files of a checkpoint."""

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import tensorstore as ts
from jaxtyping import PyTree, Shaped

from mixtral_jax.config import UserError
from mixtral_jax.runs.streaming import CHUNK, Start, named_leaves, open_array, place

Parts = Mapping[str, Mapping[str, Any]]  # shapes and types of arrays, by part and name


@runtime_checkable
class Source(Protocol):
    """Arrays of which any part can be had, by several threads at once."""

    parts: Parts

    def block(self, part: str, name: str, start: Start, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        """Reads the part of an array that begins at `start`."""
        ...


class DeviceArrays:
    """Arrays on devices, all of them this process's."""

    def __init__(self, state: Mapping[str, PyTree]):
        """Takes parts by name, each a tree of arrays; `UserError` where other processes hold some of them."""
        self.parts: Parts = {part: named_leaves(tree) for part, tree in state.items()}
        if not all(leaf.is_fully_addressable for leaves in self.parts.values() for leaf in leaves.values()):
            raise UserError(
                "the model is spread over several processes: run the export in one, with all of the devices"
            )

    def block(self, part: str, name: str, start: Start, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        """Puts a block together on the host; devices exchange nothing."""
        leaf = self.parts[part][name]
        values = np.empty(shape, leaf.dtype)
        for shard in leaf.addressable_shards:
            if shard.replica_id:
                continue
            corner = [at.start or 0 for at in shard.index]
            first = [max(*both) for both in zip(start, corner, strict=True)]
            ends = zip(start, shape, corner, shard.data.shape, strict=True)
            sizes = [min(at + n, begin + m) - low for (at, n, begin, m), low in zip(ends, first, strict=True)]
            if all(size > 0 for size in sizes):
                inside = tuple(low - begin for low, begin in zip(first, corner, strict=True))
                there = tuple(low - at for low, at in zip(first, start, strict=True))
                values[place(there, tuple(sizes))] = np.asarray(_take(shard.data, inside, tuple(sizes)))
        return values


@partial(jax.jit, static_argnames="shape")
def _take(whole: jax.Array, start: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(whole, start, shape)


def host() -> jax.Device:
    """This machine's processor, where JAX was not told to leave it alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


class StoredArrays:
    """Arrays in the files of a checkpoint, which no device sees."""

    def __init__(self, bundle: Path, described: Mapping[str, Mapping[str, Any]]):
        """Opens nothing yet.

        Args:
            bundle: the checkpoint, found good.
            described: [shape, type] of its arrays, by part and name.
        """
        self.parts: Parts = {
            part: {name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in facts.items()}
            for part, facts in described.items()
        }
        self._bundle = bundle
        self._opened: dict[tuple[str, str], ts.TensorStore] = {}
        self._opening = threading.Lock()
        # A small model's file holds several of the blocks that are asked for.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 4 * CHUNK}})

    def block(self, part: str, name: str, start: Start, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        """Reads a block from the files; `UserError` where they are gone."""
        try:
            with self._opening:
                if (part, name) not in self._opened:
                    self._opened[part, name] = open_array(self._bundle / "state" / part, name, self._context)
                store = self._opened[part, name]
            return store[place(start, shape)].read().result()
        except ValueError as error:  # tensorstore's own, whatever it is
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"{self._bundle} lost files while it was read, as a run that goes on removes old checkpoints: try "
                f"again, or raise its checkpoint.keep ({reason})"
            ) from None
