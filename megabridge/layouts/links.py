"""Times of collectives and messages between the ranks of a layout. No torch.

Ranks are numbered as megabridge.parallel.topology says, and fill the hosts one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Final

from megabridge.layouts.devices import Device

INSIDE_SHARE: Final = 0.8
"""Share of a link's bandwidth that a collective inside a host reaches. Assumed."""
BETWEEN_SHARE: Final = 0.6
"""Share that a collective between hosts reaches. Assumed."""
LATENCY_INSIDE: Final = 10e-6
"""Latency in seconds of a collective inside a host, multiplied by log2 of the number of ranks. Assumed."""
LATENCY_BETWEEN: Final = 30e-6
"""Latency of a collective over several hosts, likewise. Assumed."""


@dataclass(frozen=True)
class Group:
    """`size` ranks that stand `stride` apart."""

    size: int
    stride: int

    def on_a_host(self, device: Device) -> int:
        """Returns how many of them share a host."""
        if self.stride >= device.per_host:
            return 1
        if self.size * self.stride <= device.per_host and device.per_host % (self.size * self.stride) == 0:
            return self.size
        return max(1, min(self.size - 1, device.per_host // self.stride))


def ring(bytes_: float, group: Group, device: Device) -> float:
    """Returns the seconds of an all-gather or reduce-scatter whose whole tensor has `bytes_`.

    Across hosts every rank of a host brings its own link to the others.
    """
    if group.size == 1 or not bytes_:
        return 0.0
    here = group.on_a_host(device)
    is_inside = here == group.size
    between = device.between_gbs * here * BETWEEN_SHARE
    bandwidth = device.inside_gbs * INSIDE_SHARE if is_inside else min(device.inside_gbs * INSIDE_SHARE, between)
    moved = bytes_ * (group.size - 1) / group.size
    return moved / (bandwidth * 1e9) + _latency(group, is_inside=is_inside)


def all_to_all(bytes_: float, group: Group, device: Device) -> float:
    """Returns the seconds in which every rank sends `bytes_`, evenly, to all of them, itself included."""
    if group.size == 1 or not bytes_:
        return 0.0
    here = group.on_a_host(device)
    inside = bytes_ * (here - 1) / group.size / (device.inside_gbs * 1e9 * INSIDE_SHARE)
    between = bytes_ * (group.size - here) / group.size / (device.between_gbs * 1e9 * BETWEEN_SHARE)
    return max(inside, between) + _latency(group, is_inside=here == group.size)


def send(bytes_: float, *, distance: int, world: int, device: Device) -> float:
    """Returns the seconds of one message to the rank that stands `distance` further, among `world`."""
    is_inside = world <= device.per_host or distance == 0
    bandwidth = device.inside_gbs * INSIDE_SHARE if is_inside else device.between_gbs * BETWEEN_SHARE
    return bytes_ / (bandwidth * 1e9) + (LATENCY_INSIDE if is_inside else LATENCY_BETWEEN)


def _latency(group: Group, *, is_inside: bool) -> float:
    return (LATENCY_INSIDE if is_inside else LATENCY_BETWEEN) * log2(group.size)
