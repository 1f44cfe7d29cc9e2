"""Whether a mesh trains as one device does: the first step of a small model of a configuration's kind on both."""

import math
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from mixtral_jax.config import Config, KernelsConfig, MeshConfig, ObjectiveConfig, PrecisionConfig
from mixtral_jax.config_loading import replace
from mixtral_jax.console import make_console, make_table
from mixtral_jax.data.batch import Batch, HostBatch
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import Runtime, make_runtime
from mixtral_jax.sharding import MESH_AXES, RULES, axis_size, make_mesh
from mixtral_jax.training.step import Trainable
from mixtral_jax.zigzag import sequence_multiple

# Largest ||mesh - one device|| / ||one device|| of a loss, of the gradient's norm or of an array's gradient. Sums in
# another order give some 1e-6 in float32; a sum that is missing, or made twice, gives at least a few percent.
LIMIT = 1e-5
DEVICES = 8
# XLA's optimisations would take minutes for what runs once. A flag that a version does not know ends it.
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version__.startswith("0.10."):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
LOSSES = ("loss", "cross_entropy", "load_balance_loss", "router_z_loss", "dropped_share", "grad_norm")
LAYERS, KV_HEADS, PER_KV_HEAD, HEAD_DIM, D_FF, VOCAB, ROWS, TOKENS = 2, 2, 2, 8, 32, 64, 8, 32

PORTABLE: dict[str, Any] = {
    "objective": ObjectiveConfig(),
    "precision": PrecisionConfig(),
    "kernels": KernelsConfig(matmul="xla"),  # one device multiplies as each of several does
}

Step = dict[str, np.ndarray]  # losses and gradients by name


class Difference(NamedTuple):
    """How far a mesh is from one device in one number or array."""

    name: str
    alone: float  # norm on one device
    relative: float  # norm of the difference / `alone`; where that is 0, the difference's own


def run(config: Config, count: int | None) -> bool:
    """Checks a configuration's mesh on simulated devices and shows what was found.

    Args:
        config: whose mesh, and what the model is like.
        count: devices; None: as many as the mesh names, of which an axis of size -1 takes what is left of eight.

    Returns:
        Whether the mesh trains as one device does.

    Raises:
        UserError: the mesh does not fit the devices, or the model the mesh.
    """
    known = math.prod(max(1, getattr(config.mesh, axis)) for axis in MESH_AXES)
    free = any(getattr(config.mesh, axis) == -1 for axis in MESH_AXES)
    count = count or (max(DEVICES // known, 1) * known if free else known)
    jax.config.update("jax_platforms", "cpu")  # devices that are there, if any, have no part in this
    flags = (os.environ.get("XLA_FLAGS", ""), *QUICK, f"--xla_force_host_platform_device_count={count}")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    began = time.monotonic()
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    small, found = check_mesh(config, mesh)
    caption = f"norms; differences relative to them, at most {LIMIT:g}"
    table = make_table([""], ["one device", "difference"], caption)
    for name, alone, relative in found:
        table.add_row(name, f"{alone:.6g}", f"{relative:.1e}", style=None if relative <= LIMIT else "bold red")
    console = make_console()
    console.print(table)
    wrong = [name for name, _, relative in found if not relative <= LIMIT]
    model, train = small.model, small.train
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    console.print(
        f"{axes} on {count} simulated devices, {time.monotonic() - began:.0f} s: {model.num_layers} layers, d_model "
        f"{model.d_model}, {model.num_experts_per_tok} of {model.num_experts} experts, {train.batch_size} rows of "
        f"{small.data.seq_len} tokens",
        soft_wrap=True,
    )
    worst = max(found, key=lambda difference: difference.relative)
    console.print(
        f"DIFFERS from one device in {', '.join(wrong)}"
        if wrong
        else f"trains as one device does: {worst.name} differs most, by {worst.relative:.1e}",
        soft_wrap=True,
    )
    return not wrong


def check_mesh(config: Config, mesh: Mesh) -> tuple[Config, list[Difference]]:
    """Compares the first step of a small model on a configuration's mesh with the same on one device.

    Args:
        config: what the model is like.
        mesh: of simulated devices.

    Returns:
        The configuration of the small model, and how far apart its losses and gradients are.

    Raises:
        UserError: a size of the real model does not divide over the mesh.
    """
    real = replace(config, **PORTABLE)
    Trainable(Architecture(real.model, make_runtime(real, mesh)), real)  # makes no array
    parts = {axis: axis_size(mesh, axis) for axis in RULES}
    small = reduced(config, parts | {"sequence": sequence_multiple(parts["sequence"])})
    alone = make_runtime(small, make_mesh(MeshConfig(), [mesh.devices.flat[0]]))
    arrays = initial_arrays(small, alone)
    steps = [first_step(small, runtime, arrays) for runtime in (make_runtime(small, mesh), alone)]
    return small, differences(*steps)


def reduced(config: Config, parts: Mapping[str, int]) -> Config:
    """Makes a model of a configuration's kind so small that a CPU runs its step in a moment.

    It keeps the mesh, how tokens reach experts, the losses, the microbatches (two at most), the rotary embedding and
    what the backward pass recomputes. Precision is float32 and kernels are portable, so that a difference is a
    mistake of the mesh and not rounding; nothing is dropped for want of room, which depends on the mesh by design.

    Args:
        config: what divides over the mesh.
        parts: what the size of each logical axis remains a multiple of.
    """
    model, microbatches = config.model, min(config.train.microbatches, 2)

    def up(least: int, axis: str) -> int:
        return math.ceil(least / parts[axis]) * parts[axis]

    kv_heads = min(model.num_kv_heads, up(KV_HEADS, "kv_heads"))
    heads = kv_heads * min(model.num_heads // model.num_kv_heads, PER_KV_HEAD)
    head_dim = next(width for width in range(HEAD_DIM, 2 * parts["d_model"] + HEAD_DIM, 2)
                    if width * heads % parts["d_model"] == 0)  # fmt: skip
    own_experts = max(2, math.ceil(2 * model.num_experts_per_tok / parts["experts"]))  # of a device
    return replace(
        config,
        model={
            "num_layers": min(model.num_layers, LAYERS), "num_heads": heads, "num_kv_heads": kv_heads,
            "head_dim": head_dim, "d_model": heads * head_dim, "d_ff": up(D_FF, "d_ff"),
            "vocab_size": up(VOCAB, "vocab"), "init_std": 0.1, "buffer_factor": 0.0,
            "num_experts": min(model.num_experts, own_experts * parts["experts"]),
        },
        data={"seq_len": up(TOKENS, "sequence")},
        train={"microbatches": microbatches, "batch_size": microbatches * up(ROWS // microbatches, "batch")},
        **PORTABLE,
    )  # fmt: skip


def sample_batch(config: Config) -> HostBatch:
    """Draws rows of documents, some of their targets without weight, and ends each with padding of another length."""
    draw = np.random.default_rng(config.seed)
    shape = config.train.batch_size, config.data.seq_len
    begins = draw.random(shape) < 4 / shape[1]
    begins[:, 0] = True
    columns = np.arange(shape[1])
    text = columns < draw.integers(shape[1] // 2, shape[1], (shape[0], 1))
    tokens, targets = draw.integers(config.model.vocab_size, size=(2, *shape), dtype=np.int32)
    return Batch(
        tokens=tokens,
        targets=targets,
        segment_ids=np.where(text, np.cumsum(begins, axis=1), 0).astype(np.int32),
        positions=np.where(text, columns - np.maximum.accumulate(begins * columns, axis=1), 0).astype(np.int32),
        loss_mask=text & (draw.random(shape) < 0.8),
    )


def initial_arrays(config: Config, runtime: Runtime) -> PyTree:
    """Makes a model's fresh arrays, on the host."""
    return jax.tree.map(np.asarray, Architecture(config.model, runtime).init(config.seed))


def first_step(config: Config, runtime: Runtime, arrays: PyTree) -> Step:
    """Takes a step of training: its losses and its gradients, as Adam's first moments show them.

    Args:
        config: of the run.
        runtime: where.
        arrays: the model's, on the host.
    """
    trainable = Trainable(Architecture(config.model, runtime), config)
    state = trainable.start(jax.device_put(arrays, trainable.architecture.shardings()))
    state, metrics = trainable.step(state, trainable.put(sample_batch(config)))
    moments = next(part.mu for part in state.opt_state if hasattr(part, "mu"))
    norm, limit = float(metrics["grad_norm"]), config.optimizer.clip_norm
    scale = (1 - config.optimizer.beta1) * min(1.0, limit / norm if limit else 1.0)
    gradients = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(moment) / scale
        for path, moment in jax.tree_util.tree_leaves_with_path(moments)
    }
    return {name: np.asarray(metrics[name]) for name in LOSSES} | gradients


def differences(step: Step, alone: Step) -> list[Difference]:
    """Compares a step on a mesh with that of one device, number by number and array by array."""
    found = []
    for name, expected in alone.items():
        norm = float(np.linalg.norm(expected))
        error = float(np.linalg.norm(np.asarray(step[name], np.float64) - expected))
        found.append(Difference(name, norm, error / (norm or 1.0)))
    return found
