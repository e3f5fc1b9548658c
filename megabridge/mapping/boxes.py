"""Boxes: elements of a tensor as one maximal strided run of indices per dimension.

An `Axis` pairs a run of a native parameter with the run of the Hugging Face tensor that holds the same elements in the same
order. A box is one axis per dimension; all code that moves weights iterates over pairs of boxes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Run:
    """`count` blocks of `block` consecutive indices; block i begins at `start + i * stride`."""

    start: int
    count: int
    block: int
    stride: int

    @classmethod
    def span(cls, start: int, length: int) -> Run:
        """`length` consecutive indices from `start`."""
        return cls(start, 1, length, length)

    @property
    def size(self) -> int:
        return self.count * self.block

    @property
    def stop(self) -> int:
        """One past the last index."""
        return self.start + (self.count - 1) * self.stride + self.block if self.count else self.start

    @property
    def is_consecutive(self) -> bool:
        return self.count == 1 or self.stride == self.block

    def part(self, first: int, count: int, *, skip: int = 0, block: int | None = None) -> Run:
        """The `block` indices after `skip` of each of the blocks `first` to `first + count`."""
        length = self.block if block is None else block
        stride = length if count == 1 else self.stride
        return Run(self.start + first * self.stride + skip, count, length, stride)


@dataclass(frozen=True, slots=True)
class Axis:
    """The same elements on both sides along one dimension; the dim of a side that lacks the dimension is None.

    Both runs have the same count and block.
    """

    native_dim: int | None
    hf_dim: int | None
    native: Run
    hf: Run

    @property
    def size(self) -> int:
        return self.native.size

    def part(self, first: int, count: int, *, skip: int = 0, block: int | None = None) -> Axis:
        return replace(
            self,
            native=self.native.part(first, count, skip=skip, block=block),
            hf=self.hf.part(first, count, skip=skip, block=block),
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A native parameter's cut over a group: along `dim`, into `size` shares, of which this is number `index`.

    With `stride` n the dimension holds n equal sections, each of which is cut over the group separately; a rank holds its share of
    every section, concatenated (megatron-core's `partition_stride`: [gate; up] has 2). With `drops` a share is one index, and the
    local parameter lacks the dimension (one expert out of all).
    """

    dim: int
    stride: int
    size: int
    index: int
    drops: bool = False

    def segments(self, length: int) -> list[tuple[int, int, int]]:
        """(start, stop, local start) of the segments that this share has of a dimension of global size `length`."""
        share = length // (self.stride * self.size)
        starts = ((section * self.size + self.index) * share for section in range(self.stride))
        return [(start, start + share, section * share) for section, start in enumerate(starts)]


def clip(axis: Axis, start: int, stop: int) -> list[Axis]:
    """The parts of `axis` with native indices in [start, stop), at most three; their native indices stay global."""
    run = axis.native
    if run.is_consecutive:
        low, high = max(run.start, start), min(run.start + run.size, stop)
        if low >= high:
            return []
        if low == run.start and high == run.start + run.size:
            return [axis]
        if run.count == 1:
            return [axis.part(0, 1, skip=low - run.start, block=high - low)]
    parts = []
    first = max(0, -((run.start - start) // run.stride))  # the first block that begins at or after `start`
    last = min(run.count, (stop - run.start - run.block) // run.stride + 1)  # one past the last block that ends by `stop`
    head = first - 1  # the block before `first` may reach into the range
    if 0 <= head < run.count:
        begin = run.start + head * run.stride
        low, high = max(begin, start), min(begin + run.block, stop)
        if low < high:
            parts.append(axis.part(head, 1, skip=low - begin, block=high - low))
    if first < last:
        parts.append(axis.part(first, last - first))
    tail = max(last, first)
    if tail < run.count:
        begin = run.start + tail * run.stride
        high = min(begin + run.block, stop)
        if begin < high and begin >= start:
            parts.append(axis.part(tail, 1, skip=0, block=high - begin))
    return parts


def cut_axis(axis: Axis, segments: list[tuple[int, int, int]]) -> list[Axis]:
    """The parts of `axis` in `segments`, with local native indices."""
    out = []
    for start, stop, local in segments:
        for part in clip(axis, start, stop):
            shifted = replace(part.native, start=part.native.start - start + local)
            out.append(replace(part, native=shifted))
    return out
