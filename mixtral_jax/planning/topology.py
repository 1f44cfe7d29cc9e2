"""Devices that are not there: descriptions of TPU slices and GPU clusters that programs can be compiled for."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixtral_jax.config import MeshConfig, UserError
from mixtral_jax.hardware import Chip, find_chip
from mixtral_jax.sharding import arrange_devices

TARGETS = Path(__file__).parent / "targets"
TPU_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
GPUS = ("a100", "h100", "h200", "b200")
KNOWN = (
    "v4, v5p with three sides (v5p:4x4x4), v5e, v6e with two (v6e:16x16), "
    "a100, h100, h200, b200 with nodes and GPUs of a node (h100:8x8)"
)
PACKAGES = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}


@dataclass(frozen=True)
class Topology:
    """Devices to plan for; `devices` take a mesh but no arrays."""

    name: str
    platform: str  # tpu or cuda
    devices: tuple[Any, ...]  # jax.Device
    chip: Chip
    sides: tuple[int, ...]  # of one slice; nodes and GPUs of a node
    slices: int

    @cached_property
    def place(self) -> list[tuple[int, tuple[int, ...]]]:
        """For every device the number of its slice or node, and its place inside."""
        if self.platform == "cuda":
            return [(d.process_index, (d.id % self.sides[1],)) for d in self.devices]
        return [(getattr(d, "slice_index", 0) or 0, tuple(d.coords[: len(self.sides)])) for d in self.devices]

    def arranged(self, mesh: MeshConfig) -> "Topology":
        """The same devices in the order of a mesh, which is the order of a program's partitions."""
        return dataclasses.replace(self, devices=tuple(arrange_devices(mesh, self.devices).flat))


def describe_topology(name: str, slices: int = 1) -> Topology:
    """Finds the devices of a topology.

    Args:
        name: chip and sides, such as `v5p:4x4x4` or `h100:8x8`.
        slices: TPU slices of that shape, joined by the data centre's network.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip, sides = (match[1], tuple(int(side) for side in match[2].split("x"))) if match else ("", ())
    expected = TPU_DIMENSIONS.get(chip, 2 if chip in GPUS else 0)
    if len(sides) != expected or not expected or 0 in sides:
        raise UserError(f"'{name}' is no topology: known are {KNOWN}")
    if chip in GPUS and slices > 1:
        raise UserError(f"--slices is for TPU: say {chip}:{sides[0] * slices}x{sides[1]} for more nodes")
    platform = "cuda" if chip in GPUS else "tpu"
    if importlib.util.find_spec(PACKAGES[platform]) is None:
        raise UserError(f"planning for {chip} needs {PACKAGES[platform]}: pip install 'mixtral_jax[plan]'")
    devices = _cuda(chip, sides) if platform == "cuda" else _tpu(name, slices)
    row = find_chip(devices[0].device_kind)
    assert row is not None, devices[0].device_kind
    return Topology(name, platform, devices, row, sides, slices)


def _tpu(name: str, slices: int) -> tuple[Any, ...]:
    # No machine to ask about itself, and no other process to shut out.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax
    from jax.experimental import topologies

    try:
        with quiet():
            several = {"num_slices": slices} if slices > 1 else {}
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"'{name}' is no topology that libtpu knows ({str(error).splitlines()[0]}): {KNOWN}") from None
    return tuple(found.devices)


def _cuda(chip: str, sides: tuple[int, ...]) -> tuple[Any, ...]:
    from jax.experimental import topologies

    target = (TARGETS / f"{chip}.txtpb").read_text()
    with quiet():
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{sides[0]}x{sides[1]}")
    return tuple(found.devices)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the compilers' libraries write to standard error: they miss the hardware and say so at length."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
