"""What a model and its losses read of a batch, and its way onto the devices."""

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float32, Int32

from mixtral_jax.config import ObjectiveConfig
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
    mismatched: "Batch[A] | None" = None  # for KTO: the prompts of these rows, each with the answer to another


HostBatch = Batch[np.ndarray]


def padding(rows: int, seq_len: int, objective: ObjectiveConfig | None = None) -> HostBatch:
    """Makes a batch of nothing but padding, to be filled, with what an objective's losses read."""
    tokens, targets, segment_ids, positions = np.zeros((4, rows, seq_len), np.int32)
    judged = objective is not None and objective.name == "preference"
    nats = np.zeros((rows, seq_len), np.float32) if judged else None
    batch = Batch(tokens, targets, segment_ids, positions, np.zeros((rows, seq_len), bool), nats)
    if objective and objective.needs_mismatched:
        return dataclasses.replace(batch, mismatched=jax.tree.map(np.copy, batch))
    return batch


def fill(batch: HostBatch, rows: Any, part: HostBatch) -> None:
    """Writes a part into some rows of a batch."""
    jax.tree.map(lambda whole, own: operator.setitem(whole, rows, own), batch, part)


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
    return Batch(**jax.tree.map(put, given))
