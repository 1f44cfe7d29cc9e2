"""The device's side of evaluation: what a model says at every position of a batch, and nothing of the router's losses.

Everything that evaluation asks of a model goes through `_compile`: rows are spread over the mesh there, and results
come back whole, on every host, in the order of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Integer

from mixtral_jax.data.batch import Batch, HostBatch, put_batch
from mixtral_jax.kernels.cross_entropy import token_losses
from mixtral_jax.model.mixtral import Architecture, Arrays, Mixtral
from mixtral_jax.sharding import axis_size, named_sharding
from mixtral_jax.zigzag import column_order


class TokenScores(NamedTuple):
    """What a model says of the targets of a batch, each [rows, context]."""

    nats: Float[np.ndarray, "rows context"]  # -log p(target), float32
    greedy: Bool[np.ndarray, "rows context"]  # bool: no token is likelier than the target


# Scores a batch of [rows, context] arrays (see `evaluation_batches`); where `loss_mask` is false, numbers mean nothing.
Score = Callable[[HostBatch], TokenScores]


class Routes(NamedTuple):
    """What the routers say of every position of a batch; of padding, it means nothing."""

    experts: Integer[np.ndarray, "rows context layers k"]  # chosen, best first
    entropy: Float[np.ndarray, "rows context layers"]  # of the probabilities of all experts, nats


Route = Callable[[HostBatch], Routes]


def make_scorer(architecture: Architecture) -> Callable[[Arrays], Score]:
    """Compiles scoring once a shape and returns a function from a model's arrays to a scorer of host batches."""
    runtime = architecture.runtime

    def scores(model: Mixtral, batch: Batch) -> Any:
        x, _ = model(batch.tokens, batch.segment_ids, batch.positions)
        settings: dict[str, Any] = {"mesh": runtime.mesh, "backend": runtime.matmul, "chunk": runtime.loss_chunk}
        return token_losses(x, model.head(), batch.targets, **settings)

    return _compile(architecture, scores, TokenScores)


def make_router(architecture: Architecture) -> Callable[[Arrays], Route]:
    """Compiles routing once a shape and returns a function from a model's arrays to the routes of host batches."""
    small = jnp.uint8 if architecture.config.num_experts <= 1 << 8 else jnp.uint16

    def routes(model: Mixtral, batch: Batch) -> Any:
        _, router = model(batch.tokens, batch.segment_ids, batch.positions)
        entropy = jnp.sum(jax.scipy.special.entr(jax.nn.softmax(router.router_logits, axis=-1)), axis=-1)
        return jnp.moveaxis(router.expert_indices, 0, 2).astype(small), jnp.moveaxis(entropy, 0, 2)

    return _compile(architecture, routes, Routes)


def _compile(
    architecture: Architecture, outputs: Callable[[Mixtral, Batch], tuple[Any, Any]], names: Callable[..., Any]
) -> Callable[[Arrays], Callable[[HostBatch], Any]]:
    """Makes a function of a model's arrays and of host batches out of one on the device.

    Args:
        architecture: the model's shapes, on its mesh.
        outputs: two arrays [rows, context, ...] of a batch.
        names: gives them their names.
    """
    mesh = architecture.runtime.mesh
    sharding = named_sharding(mesh, ("batch", "sequence"))
    replicated = NamedSharding(mesh, PartitionSpec())
    devices = axis_size(mesh, "batch")
    compiled = jax.jit(lambda arrays, batch: outputs(architecture.bind(arrays), batch), out_shardings=replicated)

    def with_arrays(arrays: Arrays) -> Callable[[HostBatch], Any]:
        def call(batch: HostBatch) -> Any:
            rows = len(batch.tokens)
            pad = ((0, -rows % devices), (0, 0))  # every device gets a row; empty rows count nothing
            padded = jax.tree.map(lambda x: np.pad(x, pad), batch)
            column_of = np.argsort(column_order(batch.tokens.shape[1], mesh.shape["context"]))
            results = compiled(arrays, put_batch(padded, sharding))
            return names(*(np.asarray(x)[:rows, column_of] for x in results))

        return call

    return with_arrays
