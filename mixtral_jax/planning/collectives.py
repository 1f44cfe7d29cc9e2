"""Finds every collective operation of a compiled program: its bytes, how often it runs, over which mesh axes."""

import re
from collections import defaultdict
from dataclasses import dataclass

from jax.sharding import Mesh

from mixtral_jax.planning.groups import axes_of, participants
from mixtral_jax.planning.hlo import Computation, Instruction, Module

# What libtpu makes of collectives between slices: a transfer by the host's network, with the collective's name.
BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SENT_BY_ALL_REDUCE = 2  # it is a reduce-scatter and an all-gather


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program's text."""

    name: str
    kind: str
    payload: float  # bytes on one device: of the whole array gathered, reduced or exchanged, once
    runs: int  # times a step
    axes: tuple[str, ...]  # mesh axes that it joins
    groups: tuple[tuple[int, ...], ...]  # devices by their place in the mesh; of a permute, pairs
    source: str  # the operation of the model that asked for it

    @property
    def moved(self) -> float:
        """Bytes that one device sends (and receives) in one run, whatever the algorithm.

        payload * (n - 1) / n of n devices for gather, reduce-scatter and exchange; twice that for all-reduce; the
        payload for a permute.
        """
        size = len(self.groups[0])
        if self.kind == "collective-permute":
            return self.payload
        return self.payload * (size - 1) / size * (SENT_BY_ALL_REDUCE if self.kind == "all-reduce" else 1)


def find_collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """Lists the collectives that run and join more than one device.

    Args:
        module: the program.
        mesh: its devices in the order of the program's partitions.
    """
    found = []
    for computation_name, computation in module.computations.items():
        if not module.runs[computation_name]:
            continue
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
            if kind in KINDS:
                groups = participants(instruction, mesh.size)
                payload = _payload(kind, instruction, computation)
            elif kind == "send" and transfer:
                kind, groups = BETWEEN_SLICES[transfer[1]], _twins(mesh)
                payload = instruction.shapes[0].bytes * (len(groups[0]) if kind == "all-gather" else 1)
            else:
                continue
            if kind == "collective-permute":
                groups = [pair for pair in groups if pair[0] != pair[1]]
            if not groups or len(groups[0]) == 1:
                continue
            if kind == "all-reduce" and _only_a_slice_is_kept(instruction, computation):
                kind = "reduce-scatter"  # how TPU programs write it
            found.append(
                Collective(
                    name=instruction.name,
                    kind=kind,
                    payload=payload,
                    runs=module.runs[computation_name],
                    axes=axes_of(groups, mesh),
                    groups=tuple(tuple(group) for group in groups),
                    source=instruction.source,
                )
            )
    return found


def _twins(mesh: Mesh) -> list[list[int]]:
    """Groups of devices that have the same place in different slices."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, device in enumerate(mesh.devices.flat):
        groups[tuple(device.coords)].append(index)
    return list(groups.values())


def _payload(kind: str, instruction: Instruction, computation: Computation) -> float:
    taken = sum((computation[name].bytes for name in instruction.operands if name in computation), 0.0)
    given = instruction.bytes
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        given -= taken  # a started operation's result holds its operands too
    if kind == "ragged-all-to-all":
        # One side is a buffer for the worst case, the other this device's own rows: those are what moves.
        buffers = [computation[name].bytes for name in instruction.operands[:2]]
        return min(buffers)
    return given if kind == "all-gather" else taken


def _only_a_slice_is_kept(instruction: Instruction, computation: Computation) -> bool:
    users = [other for other in computation.values() if instruction.name in other.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)
