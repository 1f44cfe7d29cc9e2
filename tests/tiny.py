"""A model small enough to compile in seconds, batches for it, and the way to a training step on any mesh."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from mixtral_jax.config import Config, MeshConfig
from mixtral_jax.config_loading import parse_config, replace
from mixtral_jax.data.batch import Batch, HostBatch
from mixtral_jax.kernels.backends import available
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.model.moe import MoE, SelectionBias
from mixtral_jax.runtime import Runtime, make_runtime
from mixtral_jax.sharding import MESH_AXES, make_mesh
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import Trainable

# Largest errors, see `oracles.error`, of products with some tens of terms and of few of them one after the other.
LIMITS = {"xla": 1e-6, "mkl": 1e-6, "amx": 4e-5}


def by_engine(engine: str, *values: Any) -> Any:
    """Parameters of a test, which is skipped where the machine has no such products."""
    reason = {"amx": "the processor has no AMX", "mkl": "the package mkl is not there, as on every ARM"}[engine]
    return pytest.param(*values or (engine,), marks=pytest.mark.skipif(not available(engine), reason=reason))


@contextlib.contextmanager
def host_threads(count: int) -> Iterator[None]:
    """Lets so many threads be asked to share what the host computes."""
    from mixtral_jax.kernels.cpu.intrinsics import THREADS, state

    before, state[THREADS] = state[THREADS], count
    yield
    state[THREADS] = before


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names what is compiled meanwhile, once a program."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


ENGINES = [by_engine("amx"), by_engine("mkl")]

TINY = """
model: {d_model: 32, d_ff: 48, num_layers: 2, num_heads: 4, num_kv_heads: 2, head_dim: 8, vocab_size: 64,
        num_experts: 4, num_experts_per_tok: 2, rope_theta: 1e4, norm_eps: 1e-5}
data: {seq_len: 32}
train: {steps: 20, batch_size: 8}
optimizer: {learning_rate: 1e-2, warmup_steps: 5}
"""


def tiny_config(*overrides: str, **changes: Any) -> Config:
    """The tiny configuration with changes: `tiny_config("train.steps=5", model={"num_layers": 1})`."""
    return replace(_parsed(overrides), **changes)


@functools.cache
def _parsed(overrides: tuple[str, ...]) -> Config:
    return parse_config(TINY, list(overrides))


def mesh_of(**sizes: int) -> Mesh:
    """A mesh over the first so many of the simulated devices; no size: one device."""
    config = MeshConfig(**{"fsdp": 1, **sizes})
    return make_mesh(config, jax.devices()[: int(np.prod([getattr(config, name) for name in MESH_AXES]))])


def tiny_architecture(config: Config, mesh: Mesh | None = None) -> Architecture:
    return Architecture(config.model, make_runtime(config, mesh or mesh_of()))


def tiny_trainable(config: Config, mesh: Mesh | None = None) -> Trainable:
    return Trainable(tiny_architecture(config, mesh), config)


def packed_ids(lengths: list[list[int]], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of rows that hold documents of these lengths, padded at the end."""
    segment_ids, positions = np.zeros((2, len(lengths), seq_len), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            segment_ids[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    return segment_ids, positions


def tiny_batch(config: Config, seed: int = 0, *, ragged: bool = True) -> HostBatch:
    """Documents of a language that can be learnt (each token follows from the last), a different load in every row."""
    rng = np.random.default_rng(seed)
    rows, seq_len, vocab = config.train.batch_size, config.data.seq_len, config.model.vocab_size
    stream = [rng.integers(vocab, size=rows)]
    for _ in range(seq_len):
        stream.append(np.where(rng.random(rows) < 0.1, rng.integers(vocab, size=rows), (stream[-1] * 5 + 3) % vocab))
    text = np.stack(stream, axis=1).astype(np.int32)
    lengths = [[1 + row % 5, 7, seq_len // 2 - row % 4] if ragged else [seq_len] for row in range(rows)]
    segment_ids, positions = packed_ids(lengths, seq_len)
    ends = np.pad(segment_ids[:, 1:], ((0, 0), (0, 1))) != segment_ids
    loss_mask = (segment_ids > 0) & ~ends & (rng.random(segment_ids.shape) < (0.8 if ragged else 1.1))
    return Batch(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        segment_ids=segment_ids,
        positions=positions,
        loss_mask=loss_mask,
    )


def train(trainable: Trainable, steps: int, *, seed: int = 0) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
    """Trains from scratch on `tiny_batch(seed + step)`; returns the state and the metrics of every step."""
    state = trainable.start(trainable.architecture.init(seed))
    history = []
    for step in range(steps):
        state, metrics = trainable.step(state, trainable.put(tiny_batch(trainable.config, seed + step)))
        history.append(jax.tree.map(np.asarray, metrics))
    return state, history


def moe_layer(config: Config, runtime: Runtime) -> Callable[..., Any]:
    """One mixture layer: output, dropped count and gradients as a compiled function of (arrays, valid, d_y)."""
    graph, params, bias = nnx.split(MoE(config.model, runtime, rngs=nnx.Rngs(0)), nnx.Param, SelectionBias)

    def apply(x, router, w_gate, w_up, w_down, valid):
        named = {"router": router, "w_gate": w_gate, "w_up": w_up, "w_down": w_down}
        state = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(named))
        y, out, _ = nnx.merge(graph, state, bias)(x, valid)
        return y, out.dropped

    @jax.jit
    def run(arrays, valid, d_y):
        y, pull, dropped = jax.vjp(lambda *a: apply(*a, valid), *arrays, has_aux=True)
        return y, dropped, pull(d_y)

    return run
