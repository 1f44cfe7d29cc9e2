"""Sentences that say what to change: when a step does not fit, and where its time is wasted."""

from typing import Any

from mixtral_jax.config import Config
from mixtral_jax.config_loading import replace
from mixtral_jax.hardware import GIB
from mixtral_jax.planning.estimate import estimate
from mixtral_jax.planning.roofline import Plan
from mixtral_jax.planning.topology import Topology

REMATS = ("none", "dots", "full")  # the less is kept, the later
WASTE = 2.0  # compiled FLOPs over useful ones from which a plan says why; full remat alone makes 1.33


def advise(plan: Plan) -> list[str]:
    """Says whether it fits, what to change if not, and what else is worth a word."""
    chip, memory = plan.topology.chip, plan.memory.total
    said = []
    if plan.fits:
        said.append(f"Fits: {(chip.memory - memory) / GIB:.1f} GiB a device are left.")
    else:
        said.append(f"DOES NOT FIT: {memory / GIB:.1f} GiB of {chip.memory / GIB:.1f} GiB a device.")
        said += remedies(plan.config, plan.topology, memory)
    if plan.topology.platform == "cuda" and plan.fits and memory > 0.75 * chip.memory:
        share = min(0.97, memory / chip.memory + 0.03)
        said.append(
            f"JAX takes three quarters of a GPU's memory unless told: set XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f}."
        )
    if plan.work.flops > WASTE * plan.model_flops:
        said.append(_waste(plan))
    if plan.data_dependent_loops:
        said.append(
            f"{plan.data_dependent_loops} loops turn as often as the data says; each was counted for {plan.turns} turns"
            + (", the balanced load of the experts." if plan.turns > 1 else ": compute and memory time are too low.")
        )
    return said


def remedies(config: Config, topology: Topology, needed: float) -> list[str]:
    """Finds single changes that should make a step fit.

    Args:
        config: what does not fit; every mesh axis has its size.
        topology: where.
        needed: bytes a device that the compiler asks for.

    Returns:
        A sentence for every kind of change that helps, with how much; the simple model's figures are scaled to
        what the compiler asked for.
    """
    scale = needed / estimate(config, topology).memory
    room = topology.chip.memory

    train, mesh = config.train, config.mesh
    rows = mesh.data * mesh.fsdp * mesh.expert
    parts = [n for n in (2**p * train.microbatches for p in range(1, 8)) if train.batch_size % (n * rows) == 0]
    sizes = [n for n in (train.batch_size // 2**p for p in range(1, 8)) if n and n % (rows * train.microbatches) == 0]
    changes: list[dict[str, dict[str, Any]]] = [
        *({"train": {"remat": remat}} for remat in REMATS[REMATS.index(train.remat) + 1 :]),
        *({"train": {"microbatches": n}} for n in parts),
        *({"train": {"batch_size": n}} for n in sizes),
        *([{"mesh": {"data": 1, "fsdp": mesh.fsdp * mesh.data}}] if mesh.data > 1 else []),
    ]
    said = []
    fitting: dict[str, str] = {}
    for change in changes:
        words = [f"{section}.{key}={value}" for section, keys in change.items() for key, value in keys.items()]
        memory = scale * estimate(replace(config, **change), topology).memory
        said.append((" ".join(words), memory / GIB))
        if memory <= room:
            fitting.setdefault(words[0].split("=")[0], f"{said[-1][0]} should bring it to about {memory / GIB:.0f} GiB")
    if fitting:
        return [f"What would do, each alone: {'; '.join(fitting.values())}."]
    best = min(said, key=lambda entry: entry[1], default=None)
    least = f" ({best[0]} alone comes to about {best[1]:.0f} GiB)" if best else ""
    times = -(-needed // room)
    return [
        f"No single change of remat, microbatches, batch or mesh does{least}: take about {times:.0f} times as many "
        f"devices with mesh.fsdp {times:.0f} times as large, or let --search combine changes."
    ]


def _waste(plan: Plan) -> str:
    config, expert_devices = plan.config, plan.config.mesh.expert
    ratio = plan.work.flops / plan.model_flops
    remat = "" if config.train.remat == "none" else f", of which remat={config.train.remat} repeats up to 1.33"
    dense = "XLA's grouped product computes every row of the worst-case buffer with every local expert"
    if "ragged_dot" not in plan.description:
        why = "the rest is what XLA adds"
    elif plan.topology.platform == "cuda":
        why = f"{dense}; kernels.experts=triton does not"
    else:
        why = f"for the weights' gradient {dense}; kernels.experts=megablox does not"
    return (
        f"The compiled program computes {ratio:.1f} times the useful FLOPs{remat}: {why} "
        f"(mesh.expert={expert_devices}, model.num_experts={config.model.num_experts})."
    )
