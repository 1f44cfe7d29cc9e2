"""Topologies without their compilers' libraries: places are all that the network's formulas ask of a device."""

import math
from dataclasses import dataclass

import numpy as np

from mixtral_jax.hardware import find_chip
from mixtral_jax.planning.topology import Topology

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "h100": "NVIDIA H100 80GB HBM3"}


@dataclass(frozen=True)
class FakeDevice:
    coords: tuple[int, ...]
    slice_index: int


def fake_topology(name: str, slices: int = 1) -> Topology:
    chip, sides = name.split(":")[0], tuple(int(side) for side in name.split(":")[1].split("x"))
    platform = "cuda" if chip == "h100" else "tpu"
    count = math.prod(sides)
    # libtpu counts along the first side first.
    coords = [tuple(int(c) for c in np.unravel_index(i, sides, order="F")) for i in range(count)]
    devices = tuple(FakeDevice(place, number) for number in range(slices) for place in coords)
    return Topology(name, platform, devices, find_chip(KINDS[chip]), sides, slices)
