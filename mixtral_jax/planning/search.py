"""Which mesh, batch and remat: every candidate by the simple model, the best few by the compiler."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mixtral_jax.config import Config, UserError
from mixtral_jax.config_loading import replace
from mixtral_jax.planning.compile import DoesNotFitError, compile_step
from mixtral_jax.planning.estimate import Estimate, estimate
from mixtral_jax.planning.roofline import Plan, make_plan
from mixtral_jax.planning.topology import Topology
from mixtral_jax.sharding import MESH_AXES

REMATS = ("none", "dots", "full")
HEADROOM = 0.92  # of the chip's memory that an estimate may fill: it is a model, not a promise


@dataclass(frozen=True)
class Candidate:
    """A configuration and what the simple model says of it."""

    config: Config
    estimate: Estimate

    def key(self) -> tuple[float, int, float]:
        """Sorts the fastest first; among equals the one with fewer parts and less memory."""
        return (
            self.estimate.seconds / self.config.train.batch_size,
            self.config.train.microbatches,
            self.estimate.memory,
        )


@dataclass(frozen=True)
class Checked:
    """A candidate that the compiler has seen."""

    candidate: Candidate
    plan: Plan | None  # None: the compiler refused
    needed: float  # bytes


def candidates(config: Config, topology: Topology, batch_sizes: list[int]) -> Iterator[Config]:
    """Makes every configuration that the shapes allow: meshes, batch sizes, microbatches, remat."""
    model, devices = config.model, len(topology.devices)
    for sizes in _meshes(devices):
        mesh = dict(zip(MESH_AXES, sizes, strict=True))
        rows, tensor = mesh["data"] * mesh["fsdp"] * mesh["expert"], mesh["tensor"]
        if (
            model.num_experts % mesh["expert"]
            or any(n % tensor for n in (model.num_heads, model.num_kv_heads, model.d_ff, model.vocab_size))
            or model.d_model % (mesh["fsdp"] * mesh["expert"])
            or config.data.seq_len % (2 * mesh["context"])  # two chunks each, see `zigzag`
        ):
            continue
        for batch_size in batch_sizes:
            for parts in (2**power for power in range(10)):
                if batch_size % (parts * rows):
                    break
                for remat in REMATS:
                    yield replace(
                        config, mesh=mesh, train={"batch_size": batch_size, "microbatches": parts, "remat": remat}
                    )


def rank(config: Config, topology: Topology, batch_sizes: list[int]) -> list[Candidate]:
    """Estimates every candidate and sorts those that should fit, the fastest first.

    Raises:
        UserError: none fits.
    """
    every = [Candidate(c, estimate(c, topology)) for c in candidates(config, topology, batch_sizes)]
    if not every:
        raise UserError(
            f"no mesh of {len(topology.devices)} devices divides train.batch_size={batch_sizes} and the model's sizes: "
            f"make the batch a multiple of {len(topology.devices)}"
        )
    room = HEADROOM * topology.chip.memory
    fitting = [c for c in every if c.estimate.memory <= room]
    if not fitting:
        least = min(every, key=lambda c: c.estimate.memory)
        times = -(-least.estimate.memory // room)
        raise UserError(
            f"nothing fits on {topology.name}: the smallest of {len(every):,} candidates needs about "
            f"{least.estimate.memory / 2**30:.0f} GiB of {topology.chip.memory / 2**30:.0f} GiB a device; "
            f"take about {times:.0f} times as many devices, or a shorter data.seq_len"
        )
    return sorted(fitting, key=Candidate.key)


def distinct(ranked: list[Candidate]) -> list[Candidate]:
    """Keeps the best candidate of every mesh and batch size, so that a short list shows different ideas."""
    best: dict[tuple, Candidate] = {}
    for candidate in ranked:
        config = candidate.config
        best.setdefault((dataclasses.astuple(config.mesh), config.train.batch_size), candidate)
    return list(best.values())


def check(candidate: Candidate, topology: Topology) -> Checked:
    """Compiles a candidate."""
    try:
        plan = make_plan(compile_step(candidate.config, topology), topology)
    except DoesNotFitError as error:
        return Checked(candidate, None, error.needed)
    return Checked(candidate, plan, plan.memory.total)


def _meshes(devices: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as an ordered product of one factor for each mesh axis."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for head in itertools.product(divisors, repeat=len(MESH_AXES) - 1):
        product = 1
        for size in head:
            product *= size
        if devices % product == 0:
            yield (*head, devices // product)
