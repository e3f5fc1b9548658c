"""Packs documents into rows, if it pays: best fit, in a random order determined by the seed alone."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SAVES: Final = 0.25
"""Share of the places that packing must save to pay."""
STEPS: Final = 8
"""Steps that an epoch must still have: few steps of many samples learn less."""


@dataclass(frozen=True)
class Filling:
    """How one epoch's rows come out in both ways; padded, a step's are as long as its longest.

    It follows from what a resumed run must have in common alone: neither layout nor micro-batches count.
    """

    tokens: int
    padded_places: int
    rows: int
    """When packed."""
    places: int
    """Of those."""
    steps: int
    """Of those; whole ones."""

    @property
    def pays(self) -> bool:
        return self.places <= (1 - SAVES) * self.padded_places and self.steps >= STEPS

    def describe(self) -> str:
        """Why it pays, or doesn't."""
        shares = [f"{1 - self.tokens / max(places, 1):.0%}" for places in (self.padded_places, self.places)]
        ways = f"{self.rows} rows with {shares[1]} padding, where steps padded to their longest sample have {shares[0]}"
        if self.pays:
            return f"packed: {ways}"
        if self.steps < STEPS:
            return f"padded: packed, an epoch would be {self.rows} rows, {self.steps} steps, and should be {STEPS}"
        return f"padded: packed, an epoch would be {ways}, and that must save {SAVES:.0%} of the places"


def filling(lengths: Sequence[int], order: Sequence[int], capacity: int, seed: int, step: int) -> Filling:
    """Of samples of these lengths, which come in `order`, `step` at once; `capacity` is a row's."""
    longest = (max(lengths[index] for index in order[begin : begin + step]) for begin in range(0, len(order), step))
    sizes = (min(step, len(order) - begin) for begin in range(0, len(order), step))
    padded = sum(most * size for most, size in zip(longest, sizes, strict=True))
    rows = len(pack(lengths, capacity, seed))
    return Filling(sum(lengths), padded, rows, rows * capacity, rows // step)


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Returns rows of indices into `lengths`, every index once, with the lengths of each row adding up to at most `capacity`.

    Documents are taken in a random order, and each goes into the row with the least room that it fits in. Within a row they keep
    that order. Time grows with len(lengths) x log(capacity). Every length must be from 1 to `capacity`.
    """
    order = list(range(len(lengths)))
    random.Random(f"pack/{seed}").shuffle(order)
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by their free positions, the newest last
    rooms: list[int] = []  # the keys of by_room, sorted
    for index in order:
        length = lengths[index]
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(index)
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows
