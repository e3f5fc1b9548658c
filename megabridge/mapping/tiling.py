"""Checks that boxes cover every element of a tensor exactly once. It compares boxes, not counts: an overlap can't hide a gap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megabridge.mapping.boxes import Run
from megabridge.mapping.layout import Shape
from megabridge.mapping.transfer import Transfer

Box = tuple[Run, ...]  # one run per dimension
Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Flaw:
    """Elements that boxes do not cover exactly once, as a half-open interval per dimension."""

    where: tuple[Interval, ...]
    times: int

    def __str__(self) -> str:
        place = ", ".join(f"{start}:{stop}" for start, stop in self.where)
        return f"[{place}] belongs to {self.times or 'no'} boxes"


def hf_boxes(transfers: Iterable[Transfer]) -> list[Box]:
    """The boxes of `transfers` in their common Hugging Face tensor."""
    return [tuple(axis.hf for axis in transfer.axes if axis.hf_dim is not None) for transfer in transfers]


def native_boxes(transfers: Iterable[Transfer]) -> list[Box]:
    """The boxes of `transfers` in their common local native parameter."""
    return [
        tuple(
            axis.native
            for axis in sorted(
                (axis for axis in transfer.axes if axis.native_dim is not None), key=lambda axis: axis.native_dim or 0
            )
        )
        for transfer in transfers
    ]


def flaw(shape: Shape, boxes: Sequence[Box], *, allow_gaps: bool = False) -> Flaw | None:
    """Returns the first elements of a tensor of `shape` that are not in exactly one of `boxes`, or None if these tile it.

    With `allow_gaps`, elements may be in no box (vocabulary padding). The part of a box outside the tensor is a flaw too, with the
    number of boxes that cover it.
    """
    if 0 in shape:
        return None
    if any(len(box) != len(shape) for box in boxes):
        return Flaw(tuple((0, length) for length in shape), len(boxes))
    return _Sweep(shape, [tuple(_intervals(run) for run in box) for box in boxes], allow_gaps).find(frozenset(range(len(boxes))), 0)


def _intervals(run: Run) -> list[Interval]:
    if run.size == 0:
        return []
    if run.is_consecutive:
        return [(run.start, run.start + run.size)]
    return [(start, start + run.block) for start in range(run.start, run.start + run.count * run.stride, run.stride)]


@dataclass(slots=True)
class _Sweep:
    """Checks dimension by dimension: boxes that overlap in the outer dimensions must tile the inner ones."""

    shape: Shape
    boxes: list[tuple[list[Interval], ...]]
    allow_gaps: bool
    known: dict[tuple[frozenset[int], int], Flaw | None] = field(default_factory=dict)

    def find(self, active: frozenset[int], dim: int) -> Flaw | None:
        key = (active, dim)
        if key not in self.known:
            self.known[key] = self._find(active, dim)
        return self.known[key]

    def _find(self, active: frozenset[int], dim: int) -> Flaw | None:
        if dim == len(self.shape):
            return None if len(active) == 1 or (self.allow_gaps and not active) else Flaw((), len(active))
        if not active:
            rest = tuple((0, length) for length in self.shape[dim:])
            return None if self.allow_gaps else Flaw(rest, 0)
        events: dict[int, list[tuple[int, int]]] = {0: [], self.shape[dim]: []}
        for box in active:
            for start, stop in self.boxes[box][dim]:
                events.setdefault(start, []).append((box, 1))
                events.setdefault(stop, []).append((box, -1))
        covering: dict[int, int] = {}
        edges = sorted(events)
        for start, stop in pairwise(edges):
            for box, change in events[start]:
                covering[box] = covering.get(box, 0) + change
                if covering[box] == 0:
                    del covering[box]
            found = self._between(start, stop, covering, dim)
            if found is not None:
                return found
        return None

    def _between(self, start: int, stop: int, covering: dict[int, int], dim: int) -> Flaw | None:
        """The flaw in the slab `start` to `stop` of dimension `dim`; `covering` is the number of times that each box covers it."""
        inner = tuple((0, length) for length in self.shape[dim + 1 :])
        is_outside = start < 0 or stop > self.shape[dim]
        if (is_outside and covering) or any(times > 1 for times in covering.values()):
            return Flaw(((start, stop), *inner), sum(covering.values()))
        found = None if is_outside else self.find(frozenset(covering), dim + 1)
        return None if found is None else Flaw(((start, stop), *found.where), found.times)
