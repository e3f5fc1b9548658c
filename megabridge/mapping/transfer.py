"""Transfers: the pieces of a layout cut for one rank. Import, export, verification and planning are walks over this list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import Any, Final

from megabridge.errors import MappingError
from megabridge.mapping.boxes import Axis, Cut, Run, cut_axis
from megabridge.mapping.dims import Dims
from megabridge.mapping.layout import Layout, Piece, Shape

SHORT: Final = 4096  # elements


@dataclass(frozen=True, slots=True)
class Transfer:
    """A box of part number `part` and the box of the local native parameter that holds the same elements.

    The axes stand in the order of the Hugging Face tensor's dimensions; `hf_shape` is the whole tensor's.
    """

    part: int
    hf_shape: Shape
    axes: tuple[Axis, ...]

    @property
    def elements(self) -> int:
        return prod(axis.size for axis in self.axes)

    def native_view(self, strides: tuple[int, ...]) -> tuple[list[int], list[int], int]:
        """(sizes, strides, offset), in elements, of the native box in a tensor of these strides.

        Two view dimensions, block number and index in the block, per axis.
        """
        return _view([(axis.native_dim, axis.native) for axis in self.axes], strides)

    def hf_view(self) -> tuple[list[int], list[int], int]:
        """The same of the Hugging Face box in the whole, contiguous tensor."""
        return _view([(axis.hf_dim, axis.hf) for axis in self.axes], contiguous_strides(self.hf_shape))

    def split(self, most: int) -> Iterator[Transfer]:
        """This transfer as several of at most `most` elements each (never less than one innermost row)."""
        if self.elements <= most:
            yield self
            return
        for dim, axis in enumerate(self.axes):
            if axis.size == 1:
                continue
            for part in _halves(axis):
                yield from replace(self, axes=(*self.axes[:dim], part, *self.axes[dim + 1 :])).split(most)
            return

    @property
    def stretches(self) -> int:
        """How many starts `rows` gives, without making them: of a box in turn and transposed there are as many as elements."""
        count, merging = 1, True
        for axis in reversed(self.axes):
            run = axis.hf
            if not (merging and run.is_consecutive):
                count *= run.count if merging else run.size
                merging = False
            elif axis.hf_dim is not None:
                merging = run.size == self.hf_shape[axis.hf_dim]
            else:
                merging = run.size == 1
        return count

    def rows(self) -> tuple[int, list[int]]:
        """(length, starts): the box as stretches of `length` consecutive elements of the flat Hugging Face tensor, in order."""
        length, outer, merging = 1, [], True
        strides = contiguous_strides(self.hf_shape)
        for axis in reversed(self.axes):
            run = axis.hf
            stride, whole = (1, 1) if axis.hf_dim is None else (strides[axis.hf_dim], self.hf_shape[axis.hf_dim])
            if merging and run.is_consecutive:
                length *= run.size
                outer.append([run.start * stride])
                merging = run.size == whole
            elif merging:  # every dimension inside is whole, so that a block is one stretch
                length *= run.block
                outer.append([(run.start + i * run.stride) * stride for i in range(run.count)])
                merging = False
            else:
                blocks = product(range(run.count), range(run.block))
                outer.append([(run.start + i * run.stride + j) * stride for i, j in blocks])
        return length, [sum(offsets) for offsets in product(*reversed(outer))]


def _halves(axis: Axis) -> list[Axis]:
    run = axis.native
    if run.count > 1:
        half = run.count // 2
        return [axis.part(0, half), axis.part(half, run.count - half)]
    half = run.block // 2
    return [axis.part(0, 1, block=half), axis.part(0, 1, skip=half, block=run.block - half)]


def coalescible(transfers: Sequence[Transfer]) -> list[tuple[Transfer, ...]]:
    """The transfers, those together that take turns along the last dimension of a tensor, side by side: gate and up by column, or
    the columns of a rank's experts.

    Short blocks only: long ones are as well moved by themselves.
    """
    groups: dict[Any, list[Transfer]] = {}
    for number, transfer in enumerate(transfers):
        *outer, last = [axis.hf for axis in transfer.axes]
        takes_turns = not last.is_consecutive and last.block <= SHORT
        key = (transfer.part, *outer, last.count, last.block, last.stride, last.start // last.stride) if takes_turns else number
        groups.setdefault(key, []).append(transfer)
    out: list[tuple[Transfer, ...]] = []
    for group in groups.values():
        group.sort(key=lambda transfer: transfer.axes[-1].hf.start)
        runs = [transfer.axes[-1].hf for transfer in group]
        is_closed = all(after.start == before.start + before.block for before, after in pairwise(runs))
        out += [tuple(group)] if is_closed else [(transfer,) for transfer in group]
    return out


def coalesced(group: Sequence[Transfer]) -> Transfer:
    """The box in the tensor of a group of `coalescible`, or of equal parts of its transfers; native sides are not said."""
    first = group[0]
    if len(group) == 1:
        return first
    last = first.axes[-1]
    turns = replace(last.hf, block=last.hf.block * len(group))
    if turns.is_consecutive:
        turns = Run.span(turns.start, turns.size)
    return replace(first, axes=(*first.axes[:-1], replace(last, hf=turns)))


def whole(shape: Shape) -> Transfer:
    """All of a tensor, which is a parameter as it is."""
    return Transfer(0, shape, tuple(Axis(dim, dim, Run.span(0, size), Run.span(0, size)) for dim, size in enumerate(shape)))


def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _view(runs: list[tuple[int | None, Run]], strides: tuple[int, ...]) -> tuple[list[int], list[int], int]:
    sizes, steps, offset = [], [], 0
    for dim, run in runs:
        step = 0 if dim is None else strides[dim]
        sizes += [run.count, run.block]
        steps += [run.stride * step, step]
        offset += run.start * step
    return sizes, steps, offset


@lru_cache(maxsize=4096)
def transfers(layout: Layout, native: Shape, dims: Dims, cuts: tuple[Cut, ...]) -> tuple[Transfer, ...]:
    """What one share of a parameter of global shape `native` exchanges with its parts. Cached: layers repeat.

    `cuts` are of different dimensions; their sizes multiply to the number of shares.
    """
    shapes = layout.part_shapes(native, dims)
    out = []
    for piece in layout.pieces(native, dims):
        for axes in _cut_piece(piece, native, cuts):
            ordered = sorted(axes, key=lambda axis: -1 if axis.hf_dim is None else axis.hf_dim)
            out.append(Transfer(piece.part, shapes[piece.part], tuple(ordered)))
    return tuple(out)


def _cut_piece(piece: Piece, native: Shape, cuts: tuple[Cut, ...]) -> list[tuple[Axis, ...]]:
    boxes = [piece.axes]
    for cut in cuts:
        length = native[cut.dim]
        if length % (cut.size * cut.stride):
            raise MappingError(
                f"{length} rows of dimension {cut.dim} can't be cut into {cut.size} shares of {cut.stride} sections; "
                "choose a parallel size that divides it."
            )
        if cut.size == 1 and not cut.drops:
            continue
        segments = cut.segments(length)
        choices = [[cut_axis(axis, segments) if axis.native_dim == cut.dim else [axis] for axis in axes] for axes in boxes]
        boxes = [box for choice in choices for box in product(*choice)]
    dropped = [cut.dim for cut in cuts if cut.drops]
    return [tuple(_without(axis, dropped) for axis in axes) for axes in boxes] if dropped else boxes


def _without(axis: Axis, dropped: list[int]) -> Axis:
    """The axis in a local parameter that lacks the native dimensions `dropped`."""
    if axis.native_dim is None:
        return axis
    if axis.native_dim in dropped:
        return replace(axis, native_dim=None)
    return replace(axis, native_dim=axis.native_dim - sum(dim < axis.native_dim for dim in dropped))
