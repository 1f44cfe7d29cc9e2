"""Every notation of replica groups against groups written by hand."""

import numpy as np
import pytest

from mixtral_jax.planning.groups import axes_of, participants
from mixtral_jax.planning.hlo import parse
from tests.tiny import mesh_of

EVEN_ODD = [[0, 2, 4, 6], [1, 3, 5, 7]]
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def groups(attributes: str) -> list[list[int]]:
    line = f"ROOT %x = f32[8]{{0}} all-reduce(%p), channel_id=1, {attributes}, to_apply=%add"
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}"
    return participants(parse(text).computations["main"]["x"], 8)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", EVEN_ODD),
        ("replica_groups={}", [list(range(8))]),
        ("replica_groups=[4,2]<=[8]", PAIRS),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", EVEN_ODD),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", PAIRS),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", EVEN_ODD),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", EVEN_ODD),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_notations(attributes, expected):
    assert groups(attributes) == expected


def test_unreadable_groups_are_an_error():
    with pytest.raises(ValueError, match="cannot read the replica groups of x"):
        groups("replica_groups=news")


@pytest.mark.parametrize(
    "axes", [("fsdp",), ("expert",), ("tensor",), ("fsdp", "tensor"), ("fsdp", "expert", "tensor")]
)
def test_axes_are_those_along_which_members_differ(axes):
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    ids = np.arange(8).reshape(tuple(mesh.shape.values()))
    names = mesh.axis_names
    order = [i for i, name in enumerate(names) if name not in axes] + [
        i for i, name in enumerate(names) if name in axes
    ]
    assert axes_of(ids.transpose(order).reshape(-1, 2 ** len(axes)).tolist(), mesh) == axes
