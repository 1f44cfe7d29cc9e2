"""How long a collective keeps the network busy: near links (ICI, NVLink) and the far network (DCN, NICs) apart."""

import itertools
from collections import Counter
from typing import NamedTuple

from mixtral_jax.hardware import Interconnect
from mixtral_jax.planning.collectives import Collective
from mixtral_jax.planning.topology import Topology

WHOLE_TORUS = {2: 16, 3: 4}  # a side closes to a ring when it is a multiple of this, by the torus's dimensions


class Seconds(NamedTuple):
    """Time of one run of a collective."""

    near: float
    far: float


def network_time(collective: Collective, topology: Topology) -> Seconds:
    """Computes the least time of a collective on an idle network.

    Of a group of n devices, g in each of n / g slices or nodes, and a payload of P bytes, a device moves
    P (g - 1) / g over near links and P (n - g) / n / g over its far port: the ports of the g devices share what a slice
    must receive (an exchange sends each device's own part: P (n - g) / n; a permute sends P wherever its longest
    pair leads). All-reduce moves twice that. Near links together have `near_bandwidth`.
    """
    interconnect = topology.chip.network
    assert interconnect is not None, topology.chip.kind
    place = topology.place
    worst = Seconds(0.0, 0.0)
    for group in _kinds_of_groups(collective, place):
        near, far = _moved(collective, [place[device][0] for device in group])
        inside = [place[device][1] for device in group if place[device][0] == place[group[0]][0]]
        bandwidth = near_bandwidth(inside, topology, interconnect)
        seconds = Seconds(near / bandwidth if near else 0.0, far / interconnect.far)
        worst = Seconds(max(worst.near, seconds.near), max(worst.far, seconds.far))
    return worst


def near_bandwidth(members: list[tuple[int, ...]], topology: Topology, interconnect: Interconnect) -> float:
    """Adds up what a device can send to its group at once, in bytes/s.

    GPU: the speed of its links into the node's switch. TPU: along every side of the torus on which the members differ,
    both directions if they close a ring and one otherwise; members that are s chips apart share links with
    s - 1 other groups, which leaves them a part of 1 / s.
    """
    if topology.platform == "cuda":
        return interconnect.link * interconnect.links
    total = 0.0
    for side, length in enumerate(topology.sides):
        places = sorted({place[side] for place in members})
        if len(places) < 2:
            continue
        step = min(b - a for a, b in itertools.pairwise(places))
        ring = length % WHOLE_TORUS[len(topology.sides)] == 0 and len(places) * step == length and length > 2
        total += interconnect.link * (2 if ring else 1) / step
    return total or interconnect.link


def _kinds_of_groups(collective: Collective, place: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """One group of each geometry: the rest takes as long."""
    kinds: dict[object, tuple[int, ...]] = {}
    for group in collective.groups:
        first = place[group[0]][1]
        steps = tuple(tuple(a - b for a, b in zip(place[d][1], first, strict=True)) for d in group)
        slices = tuple(place[d][0] - place[group[0]][0] for d in group)
        kinds.setdefault((steps, slices), group)
    return list(kinds.values())


def _moved(collective: Collective, slices: list[int]) -> tuple[float, float]:
    """Bytes of a device over near links and over its far port."""
    size, payload = len(slices), collective.payload
    inside = min(Counter(slices).values())
    if collective.kind == "collective-permute":
        return (payload, 0.0) if inside == size else (0.0, payload)
    times = collective.moved / (payload * (size - 1) / size) if payload else 0.0
    far = payload * (size - inside) / size
    if "all-to-all" in collective.kind:
        return times * payload * (inside - 1) / size, times * far
    return times * payload * (inside - 1) / inside, times * far / inside
