"""Packs documents into rows: best fit, in a random order determined by the seed alone."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence


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
