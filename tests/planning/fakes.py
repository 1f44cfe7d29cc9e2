"""Topologies without their compilers' libraries: places are all that the network's formulas ask of a device."""

import math
from dataclasses import dataclass

import numpy as np

from mixtral_jax.hardware import find_chip
from mixtral_jax.planning.topology import Topology

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "h100": "NVIDIA H100 80GB HBM3",
         "h200": "NVIDIA H200", "b200": "NVIDIA B200"}  # fmt: skip


@dataclass(frozen=True)
class FakeDevice:
    """What arranging devices and the network's formulas ask of a `jax.Device`."""

    id: int
    coords: tuple[int, ...]
    slice_index: int
    process_index: int
    device_kind: str
    platform: str
    core_on_chip: int = 0


def fake_topology(name: str, slices: int = 1) -> Topology:
    chip, sides = name.split(":")[0], tuple(int(side) for side in name.split(":")[1].split("x"))
    platform = "cuda" if KINDS[chip].startswith("NVIDIA") else "tpu"
    per_slice = math.prod(sides)
    devices = []
    for i in range(slices * per_slice):
        number, inside = divmod(i, per_slice)
        # libtpu counts along the first side first.
        coords = tuple(int(c) for c in np.unravel_index(inside, sides, order="F"))
        coords = (*coords, 0, 0)[:3]
        node = inside // sides[1] if platform == "cuda" else i // 4
        devices.append(FakeDevice(i, coords, number, node, KINDS[chip], {"cuda": "gpu", "tpu": "tpu"}[platform]))
    return Topology(name, platform, tuple(devices), find_chip(KINDS[chip]), sides, slices)
