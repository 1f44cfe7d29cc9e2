"""What a model and its losses read of a batch, and its way onto the devices."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float32, Int32

from mixtral_jax.pytree import pytree
from mixtral_jax.zigzag import column_order

A = TypeVar("A", np.ndarray, jax.Array)


@pytree
@dataclass(frozen=True, eq=False)
class Batch(Generic[A]):
    """Rows of packed documents: numpy's arrays on a host, JAX's on devices."""

    tokens: Int32[A, "batch seq"]
    targets: Int32[A, "batch seq"]  # the tokens that follow
    segment_ids: Int32[A, "batch seq"]  # from 1 in each row; 0 is padding
    positions: Int32[A, "batch seq"]  # from 0 in each segment
    loss_mask: Bool[A, "batch seq"]  # whether the target counts
    # Of judged answers, the reference model's log-probability of the target in nats; see `RecordRows` for segment_ids.
    reference: Float32[A, "batch seq"] | None = None


HostBatch = Batch[np.ndarray]


def padding(rows: int, seq_len: int, *, reference: bool = False) -> HostBatch:
    """Makes a batch of nothing but padding, to be filled; of judged answers with a `reference`."""
    tokens, targets, segment_ids, positions = np.zeros((4, rows, seq_len), np.int32)
    nats = np.zeros((rows, seq_len), np.float32) if reference else None
    return Batch(tokens, targets, segment_ids, positions, np.zeros((rows, seq_len), bool), nats)


def abstract_batch(rows: int, seq_len: int, sharding: NamedSharding, *, reference: bool = False) -> Batch[Any]:
    """Describes a batch by shape, type and sharding."""
    batch = padding(rows, seq_len, reference=reference)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def put_batch(batch: HostBatch, sharding: NamedSharding, total: int | None = None, first: int = 0) -> Batch[jax.Array]:
    """Spreads a global batch over the devices, columns in the order of `zigzag`.

    Args:
        batch: those rows of the global batch that this host's devices need, at least.
        sharding: of the global arrays [total, seq].
        total: rows of the global batch; None: `batch` holds them all.
        first: number of the first row that `batch` holds.
    """
    devices = sharding.mesh.shape["context"]
    order = column_order(batch.tokens.shape[1], devices)

    def put(array: np.ndarray) -> jax.Array:
        rows = len(array) if total is None else total

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            columns = order[index[1]] if devices > 1 else index[1]  # a slice copies nothing
            return array[start - first : stop - first, columns]

        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

    given: dict[str, Any] = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    placed: dict[str, Any] = {name: None if array is None else put(array) for name, array in given.items()}
    return Batch(**placed)
