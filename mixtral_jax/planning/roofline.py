"""What bounds a step: compute, memory or network, from the compiled program and the table of chips."""

from collections import defaultdict
from dataclasses import dataclass

from mixtral_jax.config import Config
from mixtral_jax.kernels.grouped_blocks import choose_block_sizes
from mixtral_jax.metrics import flops_per_token
from mixtral_jax.planning.collectives import Collective, find_collectives
from mixtral_jax.planning.compile import Memory, Program
from mixtral_jax.planning.hlo import parse
from mixtral_jax.planning.network import network_time
from mixtral_jax.planning.topology import Topology
from mixtral_jax.planning.work import Work, count_work


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same mesh axes, in one step on one device."""

    kind: str
    axes: tuple[str, ...]
    operations: int  # in the program's text
    runs: int
    payload: float  # bytes
    moved: float  # bytes
    near: float  # seconds on near links
    far: float  # seconds on the far network


@dataclass(frozen=True)
class Plan:
    """What a compiled step needs and what bounds it."""

    topology: Topology
    config: Config
    description: str  # of the mesh and the kernels
    memory: Memory
    traffic: tuple[Traffic, ...]
    work: Work
    model_flops: float  # of one device in one step, nothing recomputed
    data_dependent_loops: int
    turns: int  # that each of them was counted for
    compile_seconds: float

    @property
    def seconds(self) -> dict[str, float]:
        """Least time of a step by what it waits for, each alone."""
        chip = self.topology.chip
        return {
            "compute": self.work.flops / chip.flops,
            "memory": self.work.memory_bytes / chip.bandwidth,
            "near network": sum(t.near for t in self.traffic),
            "far network": sum(t.far for t in self.traffic),
        }

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def mfu(self, seconds: float) -> float:
        """Model FLOP utilisation of a step of this length."""
        return self.model_flops / self.topology.chip.flops / seconds

    @property
    def fits(self) -> bool:
        """Whether the chip's memory holds it."""
        return self.memory.total <= self.topology.chip.memory


def make_plan(program: Program, topology: Topology) -> Plan:
    """Reads a compiled step."""
    config, mesh = program.config, program.runtime.mesh
    tokens = config.train.batch_size * config.data.seq_len / mesh.size
    part = tokens / config.train.microbatches
    model = config.model
    # Every device of an expert group computes its experts' part of the group's assignments.
    expert_rows = part * mesh.shape["tensor"] * model.num_experts_per_tok
    turns = 1
    if program.runtime.experts == "grouped_blocks":  # one loop for each size of block, largest first
        local = model.num_experts // mesh.shape["expert"]
        sizes = program.runtime.block_sizes or choose_block_sizes(int(expert_rows), local)
        turns = max(1, round(expert_rows / local / sum(sizes)))
    module = parse(program.text, turns)
    work = count_work(
        module,
        # One causal product of queries with keys is seq_len^2 / 2 * 2 * num_heads * head_dim FLOPs a sequence, the same
        # for every token, and num_heads is split over `tensor`, whose devices hold the same tokens:
        attention_product=part * config.data.seq_len * model.d_model,
        expert_rows=expert_rows,
        experts=model.num_experts // mesh.shape["expert"],
    )
    return Plan(
        topology=topology,
        config=config,
        description=program.runtime.describe(),
        memory=program.memory,
        traffic=tuple(summarise(find_collectives(module, mesh), topology.arranged(config.mesh))),
        work=work,
        model_flops=tokens * flops_per_token(model, config.data.seq_len),
        data_dependent_loops=module.data_dependent_loops,
        turns=turns,
        compile_seconds=program.seconds,
    )


def summarise(collectives: list[Collective], topology: Topology) -> list[Traffic]:
    """Adds up collectives of one kind over the same axes, the busiest first."""
    by_kind: dict[tuple[str, tuple[str, ...]], list[Collective]] = defaultdict(list)
    for collective in collectives:
        by_kind[collective.kind, collective.axes].append(collective)
    rows = []
    for (kind, axes), members in by_kind.items():
        times = [network_time(member, topology) for member in members]
        rows.append(
            Traffic(
                kind=kind,
                axes=axes,
                operations=len(members),
                runs=sum(m.runs for m in members),
                payload=sum(m.runs * m.payload for m in members),
                moved=sum(m.runs * m.moved for m in members),
                near=sum(m.runs * t.near for m, t in zip(members, times, strict=True)),
                far=sum(m.runs * t.far for m, t in zip(members, times, strict=True)),
            )
        )
    return sorted(rows, key=lambda row: -row.moved)
