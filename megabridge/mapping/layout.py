"""Layouts: how a native parameter is put together from whole Hugging Face tensors. Always a permutation of elements.

A layout gives the shapes of its parts and its map: pieces of maximal strided runs. The inverse is the same map read backwards.
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
    """One box of part number `part`, paired with the native elements it feeds (global indices on both sides)."""

    part: int
    axes: tuple[Axis, ...]


class Layout(Protocol):
    """What a rule says about the arrangement; a frozen value. `native` is the global native shape, before any cut."""

    def __hash__(self) -> int: ...

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        """The Hugging Face shape of every part."""
        ...

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        """Pairs of boxes that cover every native element that a part feeds, each once."""
        ...


def _whole(dim: int, length: int) -> Axis:
    return Axis(dim, dim, Run.span(0, length), Run.span(0, length))


@dataclass(frozen=True)
class Same:
    """The parameter is the tensor. With `rows`, the name of a size, the tensor has that many rows and the native parameter may
    have more (vocabulary padding): rows that no tensor feeds are zero."""

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

    `ratio` is how many units of rows each part has in one group: QKV has a group per key/value head and (heads per group, 1, 1);
    gate and up are one group of (1, 1). Sizes may be given by name (see `Dims.size`).
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
class Joined:
    """Like Fuse, but one tensor holds all parts, one below another: [q; k; v] in one."""

    groups: int | str = 1
    ratio: tuple[int | str, ...] = (1, 1)

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        Fuse(self.groups, self.ratio).part_shapes(native, dims)  # the rows must be shared without a rest
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
    """The tensors of `inner`, each with its last two dimensions exchanged (GPT-2's Conv1D). One dimension stays as it is."""

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
class Rows:
    """Row i of the parameter is tensor i, `count` in all (a norm with one tensor per head)."""

    count: int | str

    def part_shapes(self, native: Shape, dims: Dims) -> list[Shape]:
        count = dims.size(self.count)
        if native[0] != count:
            raise MappingError(f"{self.count}={count} must be the {native[0]} rows of the native parameter.")
        return [native[1:]] * count

    def pieces(self, native: Shape, dims: Dims) -> list[Piece]:
        rest = tuple(Axis(dim, dim - 1, Run.span(0, length), Run.span(0, length)) for dim, length in enumerate(native) if dim > 0)
        count = len(self.part_shapes(native, dims))
        return [Piece(i, (Axis(0, None, Run.span(i, 1), Run.span(0, 1)), *rest)) for i in range(count)]
