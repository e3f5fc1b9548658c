"""Buckets: which Hugging Face tensors are sent together, and the offsets of each rank's boxes in the send buffer. Data only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import torch

from megabridge.conversion.plan import Plan, TensorSpec, WrittenBox
from megabridge.mapping import Axis, Transfer
from megabridge.mapping.boxes import clip

ALIGNMENT: Final = 64  # bytes, of the offset of every tensor in a bucket


@dataclass(frozen=True, slots=True)
class BucketEntry:
    """A tensor inside a bucket's flat tensor, `offset` bytes from its start.

    Where tensors are sent in blocks of rows, this may be the block that starts at row `row`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    row: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as a view of the bucket's flat tensor."""
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


Entries = tuple[BucketEntry, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors, or blocks of their rows, that are sent together; `size` in bytes."""

    entries: Entries
    size: int


@dataclass(frozen=True, slots=True)
class WireBox:
    """One box of a tensor on the wire, from byte `offset` on: contiguous, in the order of the tensor's dimensions."""

    entry: BucketEntry
    native: str
    transfer: Transfer
    offset: int

    def view(self, wire: torch.Tensor) -> torch.Tensor:
        sizes, _, _ = self.transfer.hf_view()
        size = self.transfer.elements * self.entry.dtype.itemsize
        return wire[self.offset : self.offset + size].view(self.entry.dtype).view(sizes)


@dataclass(frozen=True, slots=True)
class Section:
    """The part of a bucket that one rank sends: bytes `start` to `stop` of the wire, on ranks that send or receive it."""

    rank: int
    start: int
    stop: int
    pieces: tuple[WireBox, ...]

    @property
    def is_sent(self) -> bool:
        """Whether any other rank receives it."""
        return self.stop > self.start


def aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def plan_buckets(specs: Mapping[str, TensorSpec], bucket_bytes: int, *, in_rows: bool = False) -> list[Bucket]:
    """Returns buckets of tensors, in order, each of at most `bucket_bytes`.

    A larger tensor gets a bucket of its own or, with `in_rows`, is split into blocks of rows.
    """
    out: list[Bucket] = []
    held: list[BucketEntry] = []
    size = 0
    for name, spec in specs.items():
        for row, shape in _blocks(spec, bucket_bytes) if in_rows else [(0, spec.shape)]:
            entry = BucketEntry(name, spec.dtype, shape, aligned(size), row)
            if held and entry.offset + entry.nbytes > bucket_bytes:
                out.append(Bucket(tuple(held), size))
                held, entry = [], replace(entry, offset=0)
            held.append(entry)
            size = entry.offset + entry.nbytes
    return [*out, Bucket(tuple(held), size)] if held else out


def _blocks(spec: TensorSpec, most: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields (first row, shape) of blocks of at most `most` bytes each, but at least one row."""
    row_bytes = prod(spec.shape[1:]) * spec.dtype.itemsize
    if not spec.shape or spec.shape[0] * row_bytes <= most:
        yield 0, spec.shape
        return
    step = max(1, most // row_bytes)
    for row in range(0, spec.shape[0], step):
        yield row, (min(step, spec.shape[0] - row), *spec.shape[1:])


def layout_of_bucket(bucket: Bucket, plan: Plan, rank: int, consumers: Collection[int]) -> tuple[list[Section], int]:
    """Returns the sections of `bucket` that `rank` sends, receives or keeps, ordered by sender, and its wire's length in bytes."""
    by_rank: dict[int, list[tuple[WrittenBox, BucketEntry]]] = {}
    for entry in bucket.entries:
        for source in plan.sources[plan.aliases.get(entry.name, entry.name)]:
            by_rank.setdefault(source.rank, []).append((source, entry))
    sections, position = [], 0
    for giver in sorted(by_rank):
        if rank not in consumers and giver != rank:
            continue
        start, pieces = position, []
        for source, entry in by_rank[giver]:
            for transfer in _rows(source.transfer, entry):
                pieces.append(WireBox(entry, source.native, transfer, position))
                position = aligned(position + transfer.elements * entry.dtype.itemsize)
        if all(consumer == giver for consumer in consumers):
            position = start  # the only consumer holds it already
        sections.append(Section(giver, start, position, tuple(pieces)))
    return sections, position


def _rows(transfer: Transfer, entry: BucketEntry) -> list[Transfer]:
    """Returns the parts of `transfer` inside a block of rows, as transfers to that block."""
    if entry.shape == transfer.hf_shape:
        return [transfer]
    (place,) = (place for place, axis in enumerate(transfer.axes) if axis.hf_dim == 0)
    axis = transfer.axes[place]
    parts = clip(Axis(None, None, native=axis.hf, hf=axis.native), entry.row, entry.row + entry.shape[0])
    out = []
    for part in parts:
        inside = Axis(axis.native_dim, 0, native=part.hf, hf=replace(part.native, start=part.native.start - entry.row))
        out.append(replace(transfer, hf_shape=entry.shape, axes=(*transfer.axes[:place], inside, *transfer.axes[place + 1 :])))
    return out
