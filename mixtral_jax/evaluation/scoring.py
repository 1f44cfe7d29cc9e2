"""The device's side of evaluation: cross-entropy sums of a batch, and nothing of the router's losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.kernels.cross_entropy import token_losses
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.precision import FULL
from mixtral_jax.sharding import axis_size, named_sharding
from mixtral_jax.training.step import BATCH_KEYS, put_batch

Score = Callable[[dict[str, np.ndarray]], tuple[float, int]]


def make_scorer(architecture: Architecture) -> Callable[[dict[str, Any]], Score]:
    """Compiles scoring once and returns a function from a model's arrays to a scorer of host batches.

    A scorer takes a batch of [rows, context] arrays (see `evaluation_batches`) and returns the sum of
    -log p(target) over `loss_mask` in nats, and the number of those targets.
    """
    runtime = architecture.runtime
    sharding = named_sharding(runtime.mesh, ("batch", "sequence"))
    replicated = NamedSharding(runtime.mesh, PartitionSpec())
    devices = axis_size(runtime.mesh, "batch")

    def sums(arrays: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        model = architecture.bind(arrays)
        x, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        losses = token_losses(x, model.head(), batch["targets"], mesh=runtime.mesh, chunk=runtime.loss_chunk)
        return jnp.sum(jnp.where(batch["loss_mask"], losses, 0), axis=1, dtype=FULL)

    compiled = jax.jit(sums, out_shardings=replicated)

    def with_arrays(arrays: dict[str, Any]) -> Score:
        arrays = {name: arrays[name] for name in ("params", "selection_bias")}

        def score(batch: dict[str, np.ndarray]) -> tuple[float, int]:
            pad = -batch["tokens"].shape[0] % devices  # every device gets a row; empty rows count nothing
            rows = {key: np.pad(batch[key], ((0, pad), (0, 0))) for key in BATCH_KEYS}
            sums_by_row = np.asarray(compiled(arrays, put_batch(rows, sharding)))
            return float(np.sum(sums_by_row, dtype=np.double)), int(rows["loss_mask"].sum())

        return score

    return with_arrays
