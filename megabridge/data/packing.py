"""Which documents share a row: best fit, in a random order that the seed alone decides."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's sum at most `capacity`, every index once.

    Documents come in a random order, and each goes into the row that it leaves least room in. Within a row they keep the order in
    which they came. Time grows with len(lengths) x log(capacity). Every length must be 1 to `capacity`.
    """
    order = list(range(len(lengths)))
    random.Random(f"pack/{seed}").shuffle(order)
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows with that many free places, the newest last
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
