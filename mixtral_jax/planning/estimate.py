"""A simple model of a step's memory and time, for the search: no compilation, thousands of candidates a second.

docs/planning.md holds the formulas and how far they were from the compiler.
"""

import functools
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import Config, MeshConfig
from mixtral_jax.kernels.backends import Target, choose
from mixtral_jax.metrics import flops_per_token
from mixtral_jax.model.routing import device_quota
from mixtral_jax.planning.collectives import Collective
from mixtral_jax.planning.network import Seconds, network_time
from mixtral_jax.planning.topology import Topology
from mixtral_jax.precision import FULL, make_precision
from mixtral_jax.runtime import loss_chunk, target_of
from mixtral_jax.sharding import MESH_AXES

WIDE = jnp.dtype(FULL).itemsize
# Passes over the products of a layer: forward, backward (twice), and the forward that remat repeats.
PASSES = {"none": 3, "dots": 4, "full": 4}
# Row buffers of an expert layer that are alive together in its backward pass, [rows, d_ff] and [rows, d_model].
WIDE_BUFFERS, NARROW_BUFFERS = 4, 4

BARE = 0.3  # share of memory and network time that computation is assumed not to hide

PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}  # JAX's name of a topology's platform
Move = tuple[str, tuple[str, ...], float, int]  # kind of collective, mesh axes, payload in bytes, runs


@dataclass(frozen=True)
class Estimate:
    """Of one device."""

    state: float  # bytes of parameters and optimizer
    gradients: float  # bytes
    kept: float  # bytes of activations kept for the backward pass
    working: float  # bytes of the layer, or the loss, under way
    compute: float  # seconds
    memory_time: float  # seconds
    near: float  # seconds
    far: float  # seconds
    ideal: float  # seconds of the model's FLOPs at the chip's peak

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.state + self.gradients + self.kept + self.working

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation at that speed."""
        return self.ideal / self.seconds

    @property
    def seconds(self) -> float:
        """Of a step: what takes longest, and of the rest the share that nothing hides."""
        parts = (self.compute, self.memory_time, self.near, self.far)
        return max(parts) + BARE * (sum(parts) - max(parts))


def estimate(config: Config, topology: Topology) -> Estimate:
    """Estimates a step.

    Args:
        config: every mesh axis has its size (none is -1).
        topology: the devices.
    """
    mesh = {name: getattr(config.mesh, name) for name in MESH_AXES}
    model, train, chip = config.model, config.train, topology.chip
    types = make_precision(config.precision)
    compute, master, moment, sums = (
        jnp.dtype(t).itemsize for t in (types.compute, types.params, types.optimizer, types.gradients)
    )
    d, f, layers, vocab = model.d_model, model.d_ff, model.num_layers, model.vocab_size
    tensor, expert_devices = mesh["tensor"], mesh["expert"]
    platform, devices = PLATFORMS[topology.platform], len(topology.devices)
    place = target_of(config, topology.devices[0], devices, expert=expert_devices, tensor=tensor)
    shared_devices = mesh["fsdp"] * expert_devices * tensor  # of what is not an expert's
    expert_weights = 3 * d * f * model.num_experts
    attention_weights = 2 * d * model.head_dim * (model.num_heads + model.num_kv_heads)
    own = (layers * (expert_weights + attention_weights) + 2 * vocab * d) / shared_devices
    tokens = train.batch_size * config.data.seq_len / (devices / tensor) / train.microbatches

    # Memory.
    state = own * (master + moment + WIDE)
    gradients = own * (WIDE if train.microbatches == 1 else WIDE + sums)
    local_experts = model.num_experts // expert_devices
    k = model.num_experts_per_tok
    rows = float(expert_devices * device_quota(int(tokens), k, model.num_experts, expert_devices, model.buffer_factor))
    dots = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim / tensor + d
    kept_of = {
        "full": tokens * d * compute,
        "dots": tokens * (d + dots) * compute,
        "none": tokens * (6 * d + dots) * compute + rows * (3 * f / tensor + 2 * d) * compute,
    }
    kept = layers * kept_of[train.remat]
    experts, attention = 3 * d * f * local_experts / tensor * compute, attention_weights / tensor * compute
    gathered = experts + attention
    expert_layer = rows * (WIDE_BUFFERS * f / tensor + NARROW_BUFFERS * d) * compute + 2 * gathered
    tables = vocab * d / tensor
    loss = tables * (2 * WIDE + compute) + loss_chunk(config.kernels, platform) * vocab / tensor * 3 * WIDE
    working = max(expert_layer, loss)

    # Time.
    useful = flops_per_token(model, config.data.seq_len) * train.batch_size * config.data.seq_len / devices
    # Rows that the expert products compute for each that a token asked for. XLA's grouped product computes the whole
    # buffer with every local expert on CUDA, and on TPU for the gradient of the weights, a third of the work; the other
    # kernels skip padding rows.
    waste = 1.0
    if choose("experts", config.kernels.experts, place) == "ragged_dot":
        dense = rows / (tokens * k) * local_experts
        waste = dense if platform == "gpu" else (2 + dense) / 3
    expert_flops = 6 * layers * k * 3 * d * f * tokens * train.microbatches / tensor
    # Balancing over a batch in parts costs a forward pass more, see `losses.balance_over`.
    extra = train.microbatches > 1 and config.losses.balance_over == "batch" and config.losses.load_balance > 0
    flops = (useful + (waste - 1) * expert_flops) * (PASSES[train.remat] + extra) / PASSES["none"]
    weight_passes = 2 + extra  # joined weights are not kept for the backward pass
    token_passes = (1 if train.remat == "none" else 2) + extra
    activations = layers * tokens * compute * (30 * d + 20 * f * rows / tokens / tensor)
    weights = layers * 3 * gathered
    traffic = train.microbatches * (activations + weights) + own * (3 * WIDE + 2 * master + 2 * WIDE)
    near = far = 0.0
    each = layers * train.microbatches
    moves = [
        *_weights(mesh, ("fsdp",), experts, each, weight_passes),
        *_weights(mesh, ("fsdp", "expert"), attention, each, weight_passes),
        *_weights(mesh, ("fsdp", "expert"), tables * (WIDE + compute), train.microbatches, 1),
        *_exchange(config, place, tokens * d * compute, rows * d * compute, each * (token_passes + 1)),
        ("all-reduce", ("tensor",), tokens * d * compute, each * 2 * (token_passes + 1)),
    ]
    for kind, axes, payload, runs in moves:
        rate = _seconds_per_byte(kind, axes, config.mesh, topology)
        near, far = near + runs * payload * rate.near, far + runs * payload * rate.far
    seconds = (flops / chip.flops, traffic / chip.bandwidth, near, far)
    return Estimate(state, gradients, kept, working, *seconds, ideal=useful / chip.flops)


def _weights(mesh: dict[str, int], axes: tuple[str, ...], payload: float, runs: int, passes: int) -> list[Move]:
    """Joined in every pass, their gradients scattered once and summed over the devices that hold copies."""
    own = payload / math.prod(mesh[name] for name in axes)
    return [
        ("all-gather", axes, payload, runs * passes),
        ("reduce-scatter", axes, payload, runs),
        ("all-reduce", ("data", "context"), own, runs),
    ]


def _exchange(config: Config, place: Target, tokens: float, buffer: float, runs: int) -> list[Move]:
    """Rows to their experts and back, in bytes of this device's tokens and of its buffer."""
    exchange = choose("exchange", config.kernels.exchange, place)
    if exchange == "gather":
        whole = tokens * config.mesh.expert
        return [("all-gather", ("expert",), whole, runs), ("reduce-scatter", ("expert",), whole, runs)]
    rows = tokens * config.model.num_experts_per_tok if exchange == "ragged" else buffer
    return [("all-to-all", ("expert",), rows, 2 * runs)]


@functools.cache
def _seconds_per_byte(kind: str, axes: tuple[str, ...], mesh: MeshConfig, topology: Topology) -> Seconds:
    """Time on the network for every byte of payload."""
    sizes = [getattr(mesh, name) for name in MESH_AXES]
    grouped = [i for i, name in enumerate(MESH_AXES) if name in axes]
    kept = [i for i in range(len(sizes)) if i not in grouped]
    size = math.prod(sizes[i] for i in grouped)
    if size == 1:
        return Seconds(0.0, 0.0)
    ids = np.arange(len(topology.devices)).reshape(sizes)
    groups = tuple(map(tuple, ids.transpose(kept + grouped).reshape(-1, size).tolist()))
    return network_time(Collective("", kind, 1.0, 1, axes, groups, ""), _arranged(mesh, topology))


@functools.cache
def _arranged(mesh: MeshConfig, topology: Topology) -> Topology:
    return topology.arranged(mesh)
