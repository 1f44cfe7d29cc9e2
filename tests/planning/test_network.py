"""Times on the network against arithmetic by hand."""

import numpy as np
import pytest

from mixtral_jax.planning.collectives import Collective
from mixtral_jax.planning.network import network_time
from tests.planning.fakes import fake_topology

GB = 1e9


def collective(kind, groups, payload=GB):
    return Collective("c", kind, payload, 1, (), tuple(map(tuple, groups)), "")


def columns(shape, axis):
    ids = np.arange(np.prod(shape)).reshape(shape)
    return np.moveaxis(ids, axis, -1).reshape(-1, shape[axis]).tolist()


def test_a_ring_on_one_side_of_a_torus():
    topology = fake_topology("v5p:4x4x4")
    # Device order runs along the first side: groups of 4 neighbours are rings of 2 x 100 GB/s.
    assert network_time(collective("all-gather", columns((16, 4), 1)), topology) == pytest.approx((0.75 / 200, 0))
    assert network_time(collective("all-reduce", columns((16, 4), 1)), topology) == pytest.approx((1.5 / 200, 0))
    # The whole cube: rings on three sides.
    whole = [list(range(64))]
    assert network_time(collective("all-gather", whole), topology) == pytest.approx((63 / 64 / 600, 0))


def test_half_a_side_has_no_ring_and_strided_groups_share_links():
    topology = fake_topology("v5p:4x4x4")
    assert network_time(collective("all-gather", columns((32, 2), 1)), topology) == pytest.approx((0.5 / 100, 0))
    # Two chips apart both ways round the ring of four, and two such groups on the same links.
    assert network_time(collective("all-gather", [[0, 2], [1, 3]]), topology) == pytest.approx((0.5 / 100, 0))


def test_small_slices_have_no_rings():
    assert network_time(collective("all-gather", columns((4, 4), 1)), fake_topology("v5e:4x4")) == pytest.approx(
        (0.75 / 50, 0)
    )
    assert network_time(collective("all-gather", columns((16, 16), 1)), fake_topology("v6e:16x16")) == pytest.approx(
        (15 / 16 / 200, 0)
    )


def test_nodes_share_their_network_cards():
    topology = fake_topology("h100:8x8")
    inside, across, whole = columns((8, 8), 1), columns((8, 8), 0), [list(range(64))]
    assert network_time(collective("all-gather", inside), topology) == pytest.approx((7 / 8 / 450, 0))
    assert network_time(collective("all-gather", across), topology) == pytest.approx((0, 7 / 8 / 50))
    # All 64: a node receives 7/8 of the payload through 8 cards, and passes it on over NVLink.
    assert network_time(collective("reduce-scatter", whole), topology) == pytest.approx((7 / 8 / 450, 7 / 8 / 8 / 50))
    # An exchange has no shortcut: 56 of 64 parts of everyone's payload leave the node.
    assert network_time(collective("all-to-all", whole), topology) == pytest.approx((7 / 64 / 450, 56 / 64 / 50))


def test_slices_are_joined_by_the_data_centre_s_network():
    topology = fake_topology("v5p:4x4x4", slices=2)
    twins = columns((2, 64), 0)
    assert network_time(collective("all-reduce", twins), topology) == pytest.approx((0, 1 / 6.25))
    pairs = [[0, 64], [64, 0], [1, 2]]
    near, far = network_time(collective("collective-permute", pairs), topology)
    assert far == pytest.approx(1 / 6.25)
    assert near == pytest.approx(1 / 100)
