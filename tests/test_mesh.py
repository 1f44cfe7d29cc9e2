"""The arrangement of devices over slices: which axes cross the slow network, and sentences for what cannot be."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mixtral_jax.config import DcnConfig, MeshConfig, UserError
from mixtral_jax.sharding import MESH_AXES, arrange_devices, make_mesh


def devices_of(slices: int, each: int, *, by_process: bool = False, platform: str = "gpu") -> list[SimpleNamespace]:
    """Devices as several slices would show them, not in order."""
    made = []
    for number in range(slices * each):
        place = {"process_index": number // each} if by_process else {"slice_index": number // each, "process_index": 0}
        made.append(SimpleNamespace(id=number, platform=platform, device_kind="none", **place))
    return [made[index] for index in np.random.default_rng(0).permutation(len(made))]


def slice_of(device) -> int:
    return getattr(device, "slice_index", device.process_index)


def crossed(grid: np.ndarray) -> dict[str, int]:
    """Over how many slices a walk along each axis leads."""
    numbers = np.vectorize(slice_of)(grid)
    counts = {}
    for axis, name in enumerate(MESH_AXES):
        lines = np.moveaxis(numbers, axis, -1).reshape(-1, grid.shape[axis])
        assert len({len(set(line)) for line in lines}) == 1  # every walk the same
        counts[name] = len(set(lines[0]))
    return {name: count for name, count in counts.items() if count > 1}


@pytest.mark.parametrize("by_process", [False, True])
@pytest.mark.parametrize(
    ("slices", "each", "mesh", "expected"),
    [
        (2, 4, {"fsdp": 8}, {"fsdp": 2}),
        (2, 4, {"data": 2, "fsdp": -1}, {"data": 2}),
        (2, 4, {"data": -1, "fsdp": 1, "expert": 4}, {"data": 2}),
        (4, 4, {"data": 2, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2}),
        (4, 2, {"data": 4, "fsdp": 2}, {"data": 4}),
        (4, 6, {"data": 6, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}),
        (6, 2, {"data": 4, "fsdp": 3}, {"data": 2, "fsdp": 3}),
        (2, 4, {"fsdp": 1, "expert": 8, "dcn": {"expert": 2}}, {"expert": 2}),
        (4, 2, {"data": 2, "fsdp": 1, "expert": 4, "dcn": {"expert": 2}}, {"data": 2, "expert": 2}),
        (4, 2, {"data": 2, "fsdp": 4, "dcn": {"data": 1}}, {"fsdp": 4}),
        (2, 4, {"data": 2, "context": 2, "tensor": 2, "fsdp": 1, "dcn": {"context": 2}}, {"context": 2}),
    ],
)  # fmt: skip
def test_slices_lie_along_the_axes_that_were_chosen(slices, each, mesh, expected, by_process):
    mesh = dict(mesh)
    config = MeshConfig(dcn=DcnConfig(**mesh.pop("dcn", {})), **mesh)
    devices = devices_of(slices, each, by_process=by_process)
    grid = arrange_devices(config, devices)
    assert math.prod(grid.shape) == slices * each
    assert sorted(device.id for device in grid.flat) == list(range(slices * each))
    assert crossed(grid) == expected
    for name, size in mesh.items():
        assert size in (-1, grid.shape[MESH_AXES.index(name)])


@pytest.mark.parametrize(
    ("slices", "mesh", "sentence"),
    [
        (2, {"fsdp": 1, "expert": 8}, "2 slices (nodes), which do not divide over the mesh"),
        (2, {"fsdp": 1, "expert": 8}, "make mesh.data or mesh.fsdp a multiple of 2, or say with mesh.dcn which axes"),
        (4, {"data": 2, "fsdp": 1, "tensor": 8}, "4 slices"),
        (2, {"fsdp": 8, "dcn": {"fsdp": 4}}, "fsdp=4"),
        (4, {"data": 2, "fsdp": 8, "dcn": {"data": 1, "fsdp": 2}}, "data=1 * fsdp=2"),
        (2, {"data": 2, "fsdp": -1, "dcn": {"fsdp": 3}}, "mesh.fsdp is 4 devices, not a multiple of mesh.dcn.fsdp=3"),
        (2, {"data": 3, "fsdp": 1}, "mesh data=3"),
    ],
)
def test_what_cannot_be_is_one_sentence_with_the_remedy(slices, mesh, sentence):
    mesh = dict(mesh)
    config = MeshConfig(dcn=DcnConfig(**mesh.pop("dcn", {})), **mesh)
    size = 16 if slices == 4 else 8
    with pytest.raises(UserError) as error:
        arrange_devices(config, devices_of(slices, size // slices))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_slices_of_unequal_size_are_refused():
    with pytest.raises(UserError, match="2 slices have 3 to 4 devices"):
        arrange_devices(MeshConfig(fsdp=7), sorted(devices_of(2, 4), key=lambda device: device.id)[:-1])


def chips(slices: int, **more) -> list[SimpleNamespace]:
    """Slices of 2 x 2 x 4 TPU chips, four to a process."""
    return [
        SimpleNamespace(
            id=number, platform="tpu", device_kind="TPU v5p", process_index=number // 4,
            coords=(number % 2, number // 2 % 2, number // 4 % 4), core_on_chip=0,
            **{name: number // 16 for name in more},
        )
        for number in range(16 * slices)
    ]  # fmt: skip


def test_chips_without_a_number_are_one_slice_of_many_processes():
    """So a single slice looks that is compiled for without being there."""
    grid = arrange_devices(MeshConfig(fsdp=2, expert=8), chips(1))
    assert {len({device.coords for device in ring}) for ring in grid.reshape(2, 8)} == {8}
    assert arrange_devices(MeshConfig(fsdp=1, tensor=16), chips(1)).shape == (1, 1, 1, 1, 16)


def test_neighbours_on_a_torus_stay_neighbours():
    """On a TPU the order within a slice follows the chips' coordinates, whatever the order of the processes."""
    devices = chips(2, slice_index=True)
    grid = arrange_devices(MeshConfig(data=2, fsdp=4, expert=4), devices)
    assert crossed(grid) == {"data": 2}
    for part in grid[:, :, :, 0, 0]:
        for ring in part.T:  # fsdp: four chips along the ring of four
            assert len({device.coords[:2] for device in ring}) == 1
        for square in part:  # expert: the 2 x 2 at one height
            assert len({device.coords[2] for device in square}) == 1


def test_simulated_devices_are_one_slice_in_their_order():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    assert mesh.devices.reshape(-1).tolist() == jax.devices()
