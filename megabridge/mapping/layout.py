"""Layouts: how a native parameter is assembled from whole Hugging Face tensors, its parts. Always a permutation of elements.

A layout has the shapes of its parts and a map: pieces of maximal strided runs. The inverse is the same map read backwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from megabridge.errors import MappingError
from megabridge.mapping.boxes import Axis, Run
from megabridge.mapping.dims import Dims

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of part number `part`, paired with the native elements that it fills (global indices on both sides)."""

    part: int
    axes: tuple[Axis, ...]


class Layout(Protocol):
    """The arrangement of a rule's tensors; a frozen value. `native` is the global native shape, before any cut."""

    def __hash__(self) -> int: ...

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        """Returns the Hugging Face shape of every part."""
        ...

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        """Returns pairs of boxes that cover every native element that a part fills exactly once."""
        ...


def _whole(dim: int, length: int) -> Axis:
    return Axis(dim, dim, Run.span(0, length), Run.span(0, length))


@dataclass(frozen=True)
class Same:
    """The parameter is the tensor. With `rows`, the name of a size, the tensor has that many rows, and the native parameter may
    have more (vocabulary padding), which are zero."""

    rows: str | None = None

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        if self.rows is None:
            return [native]
        rows = dims.size(self.rows)
        if native[0] < rows:
            raise MappingError(f"{self.rows}={rows} is more than the {native[0]} rows of the native parameter.")
        return [(rows, *native[1:])]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        shape = self.part_shapes(native, dims)[0]
        return [Piece(0, tuple(_whole(dim, length) for dim, length in enumerate(shape)))]


@dataclass(frozen=True)
class Fuse:
    """Row blocks of several tensors, interleaved group by group.

    `ratio` is the number of equal row blocks of each part in one group: QKV has a group per key/value head and (heads per group,
    1, 1); gate and up are one group of (1, 1). Sizes may be given by name (see `Dims.size`).
    """

    groups: int | str = 1
    ratio: tuple[int | str, ...] = (1, 1)

    def _units(self, native: Shape, dims: Dims) -> tuple[int, list[int], int]:
        groups, ratio = dims.size(self.groups), [dims.size(size) for size in self.ratio]
        unit, rest = divmod(native[0], groups * sum(ratio))
        if rest:
            raise MappingError(
                f"{native[0]} rows can't be shared by {groups} groups of {'+'.join(map(str, ratio))} equal blocks; "
                "the config's head counts contradict the parameter's shape."
            )
        return groups, ratio, unit

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        groups, ratio, unit = self._units(native, dims)
        return [(groups * share * unit, *native[1:]) for share in ratio]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        groups, ratio, unit = self._units(native, dims)
        rest = tuple(_whole(dim, length) for dim, length in enumerate(native) if dim > 0)
        out, offset, period = [], 0, sum(ratio) * unit
        for part, share in enumerate(ratio):
            rows = share * unit
            stride = rows if groups == 1 else period
            native_run, hf_run = Run(offset, groups, rows, stride), Run(0, groups, rows, rows)
            out.append(Piece(part, (Axis(0, 0, native_run, hf_run), *rest)))
            offset += rows
        return out


@dataclass(frozen=True)
class FusedSource:
    """Like Fuse, but one tensor holds all parts, concatenated by rows: [q; k; v]."""

    groups: int | str = 1
    ratio: tuple[int | str, ...] = (1, 1)

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        Fuse(self.groups, self.ratio).part_shapes(native, dims)  # raises if the rows can't be divided
        return [native]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        fuse = Fuse(self.groups, self.ratio)
        below = accumulate((shape[0] for shape in fuse.part_shapes(native, dims)), initial=0)
        out = []
        for piece, offset in zip(fuse.pieces(native, dims), below, strict=False):
            rows, *rest = piece.axes
            moved = replace(rows, hf=replace(rows.hf, start=rows.hf.start + offset))
            out.append(Piece(0, (moved, *rest)))
        return out


@dataclass(frozen=True)
class Transpose:
    """The tensors of `inner` with their last two dimensions swapped (GPT-2's Conv1D). Tensors of one dimension are unchanged."""

    inner: Layout = Same()

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        return [_exchanged(shape) for shape in self.inner.part_shapes(native, dims)]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        shapes = self.inner.part_shapes(native, dims)
        out = []
        for piece in self.inner.pieces(native, dims):
            order = _exchanged(tuple(range(len(shapes[piece.part]))))
            axes = tuple(replace(axis, hf_dim=None if axis.hf_dim is None else order[axis.hf_dim]) for axis in piece.axes)
            out.append(Piece(piece.part, axes))
        return out


def _exchanged(shape: Shape) -> Shape:
    return shape if len(shape) < 2 else (*shape[:-2], shape[-1], shape[-2])


@dataclass(frozen=True)
class PerRow:
    """Each of the parameter's `count` rows is made of its own tensors through `inner`: a norm with one tensor per head, experts
    with a gate and an up tensor each. Parts are those of row 0, then those of row 1, and so on."""

    count: int | str
    inner: Layout = Same()

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        _check_count(self.count, native, dims)
        return self.inner.part_shapes(native[1:], dims) * native[0]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        _check_count(self.count, native, dims)
        inner, parts = self.inner.pieces(native[1:], dims), len(self.inner.part_shapes(native[1:], dims))
        below = [(piece.part, tuple(_below(axis, hf=0) for axis in piece.axes)) for piece in inner]
        return [Piece(row * parts + part, (_one(row), *axes)) for row in range(native[0]) for part, axes in below]


@dataclass(frozen=True)
class Stack:
    """Each tensor of `inner` has an additional first dimension of size `count`, the parameter's first: all experts in one."""

    count: int | str
    inner: Layout = Same()

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        _check_count(self.count, native, dims)
        return [(native[0], *shape) for shape in self.inner.part_shapes(native[1:], dims)]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        _check_count(self.count, native, dims)
        inner = self.inner.pieces(native[1:], dims)
        return [Piece(p.part, (_whole(0, native[0]), *(_below(axis, hf=1) for axis in p.axes))) for p in inner]


@dataclass(frozen=True)
class ConcatRows:
    """The tensors of `inner` for each of the parameter's `count` rows, concatenated by rows: an adapter's A of all experts in one
    tensor."""

    count: int | str
    inner: Layout = Same()

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        _check_count(self.count, native, dims)
        return [(native[0] * shape[0], *shape[1:]) for shape in self.inner.part_shapes(native[1:], dims)]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        _check_count(self.count, native, dims)
        shapes = self.inner.part_shapes(native[1:], dims)

        def moved(axis: Axis, by: int) -> Axis:
            below = _below(axis, hf=0)
            return replace(below, hf=replace(below.hf, start=below.hf.start + by)) if axis.hf_dim == 0 else below

        return [
            Piece(p.part, (_one(row), *(moved(axis, row * shapes[p.part][0]) for axis in p.axes)))
            for row in range(native[0])
            for p in self.inner.pieces(native[1:], dims)
        ]


@dataclass(frozen=True)
class InterleaveColumns:
    """Like ConcatRows, but interleaved along the tensor's last dimension: an adapter's B of all experts in one tensor.

    `inner` must leave this dimension in the parameter's order.
    """

    count: int | str
    inner: Layout = Same()

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        _check_count(self.count, native, dims)
        return [(*shape[:-1], shape[-1] * native[0]) for shape in self.inner.part_shapes(native[1:], dims)]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        _check_count(self.count, native, dims)
        shapes = self.inner.part_shapes(native[1:], dims)

        def interleaved(axis: Axis, row: int, last: int) -> Axis:
            if axis.hf_dim != last:
                return _below(axis, hf=0)
            ours, theirs = Run(axis.native.start, axis.size, 1, 1), Run(row, axis.size, 1, native[0])
            return replace(_below(axis, hf=0), native=ours, hf=theirs)

        return [
            Piece(p.part, (_one(row), *(interleaved(axis, row, len(shapes[p.part]) - 1) for axis in p.axes)))
            for row in range(native[0])
            for p in self.inner.pieces(native[1:], dims)
        ]


@dataclass(frozen=True)
class Unsqueeze:
    """The tensor has an additional first dimension of size 1: a bias that a file stores as one row."""

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        return [(1, *native)]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        axes = (replace(_whole(dim, length), hf_dim=dim + 1) for dim, length in enumerate(native))
        return [Piece(0, (Axis(None, 0, Run.span(0, 1), Run.span(0, 1)), *axes))]


@dataclass(frozen=True)
class Interleave:
    """The parameter is `parts` equal blocks of rows, concatenated; the tensor takes a row from each in turn."""

    parts: int = 2

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        if native[0] % self.parts:
            raise MappingError(f"{native[0]} rows can't be {self.parts} equal blocks that a tensor interleaves.")
        return [native]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        rows = self.part_shapes(native, dims)[0][0] // self.parts
        rest = tuple(_whole(dim, length) for dim, length in enumerate(native) if dim > 0)
        runs = [(Run(part * rows, rows, 1, 1), Run(part, rows, 1, self.parts)) for part in range(self.parts)]
        return [Piece(0, (Axis(0, 0, ours, theirs), *rest)) for ours, theirs in runs]


@dataclass(frozen=True)
class Select:
    """Some parts of `inner`; the native elements of the others are filled by no tensor."""

    inner: Layout
    parts: tuple[int, ...]

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        shapes = self.inner.part_shapes(native, dims)
        return [shapes[part] for part in self.parts]

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        places = {part: place for place, part in enumerate(self.parts)}
        return [replace(p, part=places[p.part]) for p in self.inner.pieces(native, dims) if p.part in places]


def _check_count(count: int | str, native: Shape, dims: Dims) -> None:
    if native[0] != dims.size(count):
        raise MappingError(f"{count}={dims.size(count)} must be the {native[0]} rows of the native parameter.")


def _one(row: int) -> Axis:
    """The axis of one row of the parameter, a dimension that the tensor lacks."""
    return Axis(0, None, Run.span(row, 1), Run.span(0, 1))


def _below(axis: Axis, *, hf: int) -> Axis:
    """Moves an axis of one row to the whole parameter, and to a tensor with `hf` more dimensions in front."""
    native_dim = None if axis.native_dim is None else axis.native_dim + 1
    return replace(axis, native_dim=native_dim, hf_dim=None if axis.hf_dim is None else axis.hf_dim + hf)
