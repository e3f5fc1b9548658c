"""Transfers: the pieces of a layout cut for one rank. Import, export, verification and planning iterate over them."""

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
    """A box of part number `part`, and the box of the local native parameter that holds the same elements.

    The axes are in the order of the Hugging Face tensor's dimensions; `hf_shape` is the shape of the whole tensor.
    """

    part: int
    hf_shape: Shape
    axes: tuple[Axis, ...]

    @property
    def elements(self) -> int:
        return prod(axis.size for axis in self.axes)

    def native_view(self, strides: tuple[int, ...]) -> tuple[list[int], list[int], int]:
        """Returns (sizes, strides, offset), in elements, of the native box in a tensor with these strides.

        Each axis has two dimensions in the view: the block, and the index in the block.
        """
        return _view([(axis.native_dim, axis.native) for axis in self.axes], strides)

    def hf_view(self) -> tuple[list[int], list[int], int]:
        """The same for the Hugging Face box in the whole, contiguous tensor."""
        return _view([(axis.hf_dim, axis.hf) for axis in self.axes], contiguous_strides(self.hf_shape))

    def split(self, most: int) -> Iterator[Transfer]:
        """Splits this transfer into several of at most `most` elements."""
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
    def contiguous_run_count(self) -> int:
        """Number of runs in `contiguous_runs`, without making them: it can be that of the elements (interleaved and transposed)."""
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

    def contiguous_runs(self) -> tuple[int, list[int]]:
        """(length, starts): the box as runs of `length` consecutive elements of the flat Hugging Face tensor, in order."""
        length, outer, merging = 1, [], True
        strides = contiguous_strides(self.hf_shape)
        for axis in reversed(self.axes):
            run = axis.hf
            stride, whole = (1, 1) if axis.hf_dim is None else (strides[axis.hf_dim], self.hf_shape[axis.hf_dim])
            if merging and run.is_consecutive:
                length *= run.size
                outer.append([run.start * stride])
                merging = run.size == whole
            elif merging:  # every inner dimension is whole, so that a block is one run
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
    """Groups transfers whose boxes alternate along the last dimension of a tensor, side by side: interleaved columns of gate and
    up, or of a rank's experts.

    Only short blocks are grouped: it is no gain for long ones.
    """
    groups: dict[Any, list[Transfer]] = {}
    for number, transfer in enumerate(transfers):
        *outer, last = [axis.hf for axis in transfer.axes]
        alternates = not last.is_consecutive and last.block <= SHORT
        key = (transfer.part, *outer, last.count, last.block, last.stride, last.start // last.stride) if alternates else number
        groups.setdefault(key, []).append(transfer)
    out: list[tuple[Transfer, ...]] = []
    for group in groups.values():
        group.sort(key=lambda transfer: transfer.axes[-1].hf.start)
        runs = [transfer.axes[-1].hf for transfer in group]
        is_closed = all(after.start == before.start + before.block for before, after in pairwise(runs))
        out += [tuple(group)] if is_closed else [(transfer,) for transfer in group]
    return out


def coalesced(group: Sequence[Transfer]) -> Transfer:
    """Joins the tensor's boxes of a group of `coalescible`, or of equal parts of its transfers. The native side is not valid."""
    first = group[0]
    if len(group) == 1:
        return first
    last = first.axes[-1]
    joined = replace(last.hf, block=last.hf.block * len(group))
    if joined.is_consecutive:
        joined = Run.span(joined.start, joined.size)
    return replace(first, axes=(*first.axes[:-1], replace(last, hf=joined)))


def whole(shape: Shape) -> Transfer:
    """Transfer of a whole tensor that is a parameter as it is."""
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
    """Returns the transfers between one share of a parameter of global shape `native` and its parts. Cached, since layers repeat.

    `cuts` are along different dimensions; the product of their sizes is the number of shares.
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
    """Moves the axis to a local parameter that lacks the native dimensions `dropped`."""
    if axis.native_dim is None:
        return axis
    if axis.native_dim in dropped:
        return replace(axis, native_dim=None)
    return replace(axis, native_dim=axis.native_dim - sum(dim < axis.native_dim for dim in dropped))
