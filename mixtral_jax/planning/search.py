"""Which mesh, batch and remat: every candidate by the simple model, the best few by the compiler, which chooses."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mixtral_jax.config import Config, UserError
from mixtral_jax.config_loading import replace, to_yaml
from mixtral_jax.console import ProgressLine
from mixtral_jax.hardware import GIB
from mixtral_jax.planning.advice import REMATS
from mixtral_jax.planning.compile import DoesNotFitError, compile_step
from mixtral_jax.planning.estimate import Estimate, estimate
from mixtral_jax.planning.plan_text import print_plan
from mixtral_jax.planning.roofline import Plan, make_plan
from mixtral_jax.planning.topology import Topology
from mixtral_jax.sharding import MESH_AXES

SHOWN = 12  # candidates in the first table
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
            f"{least.estimate.memory / GIB:.0f} GiB of {topology.chip.memory / GIB:.0f} GiB a device; "
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


def choose(
    config: Config, topology: Topology, console: Console, batch_sizes: list[int], count: int, target: Path | None
) -> None:
    """Searches, prints what was found, and writes the best config that the compiler accepts.

    Raises:
        UserError: nothing fits.
    """
    ranked = rank(config, topology, batch_sizes)
    shown = distinct(ranked)
    said = f"{len(ranked):,} candidates should fit; the best of each mesh (~: by the simple model)"
    console.print(_table(shown[:SHOWN], [], said))
    checked: list[Plan | DoesNotFitError] = []
    with ProgressLine("compiling", count) as progress:
        for candidate in shown[:count]:
            try:
                checked.append(make_plan(compile_step(candidate.config, topology), topology))
            except DoesNotFitError as error:
                checked.append(error)
            progress.add(_mesh(candidate))
    console.print(_table(shown[:count], checked, "Checked by compiling"))
    fitting = [plan for plan in checked if isinstance(plan, Plan) and plan.fits]
    if not fitting:
        raise UserError(
            f"the compiler accepts none of the {count} best candidates: raise --check, or take more devices"
        )
    best = max(fitting, key=lambda plan: plan.mfu(max(plan.seconds.values())))
    print_plan(best, console)
    if target:
        target.write_text(to_yaml(best.config))
        console.print(f"written: {target}")


def _meshes(devices: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as an ordered product of one factor for each mesh axis."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for head in itertools.product(divisors, repeat=len(MESH_AXES) - 1):
        if devices % math.prod(head) == 0:
            yield (*head, devices // math.prod(head))


def _mesh(candidate: Candidate) -> str:
    sizes = {name: getattr(candidate.config.mesh, name) for name in MESH_AXES}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def _table(candidates: list[Candidate], checked: list[Plan | DoesNotFitError], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mesh", min_width=14)  # the one that gives way where the screen is narrow
    table.add_column("batch / parts, remat", no_wrap=True)
    guessed, compiled = ("~GiB", "~s", "~MFU"), ("GiB", "s", "MFU")
    for column in (*guessed, *(compiled if checked else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for index, candidate in enumerate(candidates):
        train, guess = candidate.config.train, candidate.estimate
        row = [_mesh(candidate), f"{train.batch_size} / {train.microbatches}, {train.remat}"]
        row += [f"{guess.memory / GIB:.1f}", f"{guess.seconds:.2f}", f"{guess.mfu:.1%}"]
        if checked:
            plan = checked[index]
            if isinstance(plan, Plan):
                seconds = max(plan.seconds.values())
                row += [f"{plan.memory.total / GIB:.1f}", f"{seconds:.2f}", f"{plan.mfu(seconds):.1%}"]
            else:
                row += [f"{plan.needed / GIB:.1f}", "no", "fit"]
        table.add_row(*row)
    return table
