"""What a model and its losses read of a batch, and its way onto the devices."""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from mixtral_jax.zigzag import column_order

Batch = dict[str, Array]
BATCH_KEYS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


def put_batch(batch: dict[str, Any], sharding: NamedSharding, total: int | None = None, first: int = 0) -> Batch:
    """Spreads what a model reads of a global batch over the devices, columns in the order of `zigzag`.

    Args:
        batch: arrays [rows, seq]; those rows of the global batch that this host's devices need, at least.
        sharding: of the global arrays [total, seq].
        total: rows of the global batch; None: `batch` holds them all.
        first: number of the first row that `batch` holds.
    """
    devices = sharding.mesh.shape["context"]
    order = column_order(batch["tokens"].shape[1], devices)

    def put(array: Any) -> jax.Array:
        rows = len(array) if total is None else total

        def part(index: Any) -> Any:
            start, stop, _ = index[0].indices(rows)
            columns = order[index[1]] if devices > 1 else index[1]  # a slice copies nothing
            return array[start - first : stop - first, columns]

        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

    return {key: put(batch[key]) for key in BATCH_KEYS}
