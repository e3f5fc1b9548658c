"""Codecs of quantised weights (block FP8, MXFP4): which stored numbers a box needs, and how they are dequantised.

A box is decoded by itself, so that a rank reads only its part, and at most one more block where a cut crosses a block's border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import torch

from megabridge.mapping import Axis, Run, Transfer

Shape = tuple[int, ...]
Ranges = tuple[tuple[int, int], ...]  # start and stop per dimension

E4M3: Final = torch.float8_e4m3fn
E4M3_MAX: Final = torch.finfo(E4M3).max
GROUP: Final = 32  # numbers that share a scale in MXFP4
# OCP Microscaling Formats 1.0, 5.3.3: the values of e2m1, by their bits.
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Values by byte: a float32, or a pair of them. numpy's `take` was three times as fast as torch's conversion.
_OF_E4M3: Final = torch.arange(256, dtype=torch.uint8).view(E4M3).to(torch.float32).numpy()
_PAIRS: Final = np.array([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)], dtype=np.float32).view(np.complex64)[:, 0]


class Codec(Protocol):
    """A format that stores a tensor as two: packed numbers, and a scale for each block of them."""

    def shape(self, stored: Shape) -> Shape:
        """Returns the shape of the decoded tensor whose packed numbers have the shape `stored`."""
        ...

    def packed_shape(self, stored: Shape) -> Shape:
        """Returns the shape of the packed numbers that `boxes` uses, over the same bytes."""
        ...

    def scales_shape(self, stored: Shape) -> Shape:
        """Returns the shape that the scales must have."""
        ...

    def boxes(self, part: Transfer, packed: Shape, scales: Shape) -> tuple[Transfer, Transfer]:
        """Returns the boxes of packed numbers and scales that are needed to decode `part`. Their native sides are not valid."""
        ...

    def halves(self, part: Transfer) -> Iterator[Transfer]:
        """Splits `part` in two or more, along a dimension that keeps packed numbers together."""
        ...

    def inside(self, packed: Ranges) -> Ranges:
        """Returns the ranges of the decoded tensor for the ranges `packed` of packed numbers."""
        ...

    def decode(self, packed: torch.Tensor, scales: torch.Tensor, part: Transfer) -> torch.Tensor:
        """Decodes `part` to bfloat16, shaped by the sizes of its axes, with any strides. `packed` and `scales` are its `boxes`,
        shaped likewise."""
        ...


@dataclass(frozen=True, slots=True)
class BlockFP8:
    """DeepSeek's FP8: e4m3 numbers in the tensor's own shape, each multiplied by the scale of its block.

    `block` are the rows and columns of a block in the last two dimensions; dimensions before them have a scale for each index.
    Arithmetic as in transformers integrations/finegrained_fp8.py:Fp8Dequantize: in float32, rounded once.
    """

    block: tuple[int, int]

    def shape(self, stored: Shape) -> Shape:
        return stored

    def packed_shape(self, stored: Shape) -> Shape:
        return stored

    def scales_shape(self, stored: Shape) -> Shape:
        return (*stored[:-2], *(-(-length // size) for length, size in zip(stored[-2:], self.block, strict=True)))

    def boxes(self, part: Transfer, packed: Shape, scales: Shape) -> tuple[Transfer, Transfer]:
        sizes = self.sizes(len(packed))
        return part, _box(scales, [_covering(run, size) for run, size in zip(runs_of(part), sizes, strict=True)])

    def halves(self, part: Transfer) -> Iterator[Transfer]:
        return part.split((part.elements + 1) // 2)

    def inside(self, packed: Ranges) -> Ranges:
        return packed

    def decode(self, packed: torch.Tensor, scales: torch.Tensor, part: Transfer) -> torch.Tensor:
        numbers = torch.from_numpy(_OF_E4M3.take(packed.view(torch.uint8).numpy()))
        return expand_scales(scales, runs_of(part), self.sizes(packed.dim())).mul_(numbers).to(torch.bfloat16)

    def sizes(self, dimensions: int) -> tuple[int, ...]:
        """Sizes of a block along each of `dimensions`."""
        return (*[1] * (dimensions - 2), *self.block)


@dataclass(frozen=True, slots=True)
class MXFP4:
    """GPT-OSS's MXFP4: the matrix [columns, rows] of each expert, row by row, with 32 numbers of a row in 16 bytes, low half first.

    Packed [experts, rows, columns / 32, 16], scales [experts, rows, columns / 32]: exponents of two, biased by 127; 255 is NaN.
    Values as in transformers integrations/mxfp4.py:convert_moe_packed_tensors, which takes 255 as 2**128.
    """

    def shape(self, stored: Shape) -> Shape:
        experts, rows, groups, _ = stored
        return experts, groups * GROUP, rows

    def packed_shape(self, stored: Shape) -> Shape:
        experts, rows, groups, size = stored
        return experts, rows, groups * size

    def scales_shape(self, stored: Shape) -> Shape:
        return stored[:-1]

    def boxes(self, part: Transfer, packed: Shape, scales: Shape) -> tuple[Transfer, Transfer]:
        experts, columns, rows = runs_of(part)
        return _box(packed, [experts, rows, _covering(columns, 2)]), _box(scales, [experts, rows, _covering(columns, GROUP)])

    def halves(self, part: Transfer) -> Iterator[Transfer]:
        order = {None: -1, 0: 0, 2: 1, 1: 2}
        stored = replace(part, axes=tuple(sorted(part.axes, key=lambda axis: order[axis.hf_dim])))
        for half in stored.split((part.elements + 1) // 2):
            yield replace(half, axes=tuple(sorted(half.axes, key=lambda axis: -1 if axis.hf_dim is None else axis.hf_dim)))

    def inside(self, packed: Ranges) -> Ranges:
        experts, rows, (start, stop) = packed
        return experts, (2 * start, 2 * stop), rows

    def decode(self, packed: torch.Tensor, scales: torch.Tensor, part: Transfer) -> torch.Tensor:
        experts, columns, rows = runs_of(part)
        numbers = torch.from_numpy(_PAIRS.take(packed.numpy()).view(np.float32))
        first = _covering(columns, 2).start * 2
        if columns.is_consecutive:
            numbers = numbers.narrow(-1, columns.start - first, columns.size)
        else:
            numbers = numbers.index_select(-1, indices(columns) - first)
        factors = expand_scales(scales.view(torch.float8_e8m0fnu), [experts, rows, columns], (1, 1, GROUP))
        return factors.mul_(numbers).to(torch.bfloat16).transpose(-1, -2)


def indices(run: Run) -> torch.Tensor:
    """Every index of `run`, in order."""
    return (torch.arange(run.count)[:, None] * run.stride + torch.arange(run.block) + run.start).flatten()


def expand_scales(scales: torch.Tensor, runs: Sequence[Run], sizes: Sequence[int]) -> torch.Tensor:
    """Returns a new float32 tensor with the scale of every element of the box `runs`; `sizes` are those of a block.

    `scales` begins with the block of the box's first element; along dimensions with blocks of size 1 it has the box's indices.
    """
    out = scales.to(torch.float32, copy=True)
    for dim, (run, size) in reversed(list(enumerate(zip(runs, sizes, strict=True)))):  # last first: later copies are of whole rows
        if size > 1:
            out = out.index_select(dim, indices(run) // size - run.start // size)
    return out


def scales_of(largest: torch.Tensor, *, ue8m0: bool) -> torch.Tensor:
    """Returns the scale of each block from its `largest` magnitude, which becomes the largest e4m3 number, or with `ue8m0` (powers
    of two) at most that.

    Blocks of zeros have scale 1.
    """
    inverse = 1.0 / _to_most(largest)
    if ue8m0:
        inverse = torch.pow(2.0, torch.ceil(torch.log2(inverse.clamp(min=torch.finfo(torch.float32).tiny))))
    return inverse


def factors_of(largest: torch.Tensor, *, ue8m0: bool) -> torch.Tensor:
    """Returns the factor that converts the elements of each block to e4m3."""
    return 1.0 / scales_of(largest, ue8m0=True) if ue8m0 else _to_most(largest)


def _to_most(largest: torch.Tensor) -> torch.Tensor:
    is_some = largest > 0
    return torch.where(is_some, E4M3_MAX / torch.where(is_some, largest, 1.0), 1.0)


def largest_of(values: torch.Tensor, runs: Sequence[Run], block: tuple[int, int], grid: torch.Tensor) -> None:
    """Raises the entries of `grid`, one per `block` of a matrix, to at least the magnitudes of `values`, its box `runs`."""
    rows, columns = (_blocks(run, size) for run, size in zip(runs, block, strict=True))
    whole_blocks = torch.zeros(rows.size * block[0], columns.size * block[1])
    down, right = (indices(run) - blocks.start * size for run, blocks, size in zip(runs, (rows, columns), block, strict=True))
    if all(run.is_consecutive for run in runs):
        whole_blocks[down[0] : down[-1] + 1, right[0] : right[-1] + 1] = values.abs()
    else:
        whole_blocks[down[:, None], right] = values.abs()
    found = whole_blocks.view(rows.size, block[0], columns.size, block[1]).amax((1, 3))
    there = grid[rows.start : rows.stop, columns.start : columns.stop]
    torch.maximum(there, found, out=there)


def runs_of(part: Transfer) -> list[Run]:
    """The run of indices along each dimension of the tensor."""
    return [axis.hf for axis in part.axes if axis.hf_dim is not None]


def _covering(run: Run, size: int) -> Run:
    """`run`, or for a `size` above 1 the blocks that hold its indices."""
    return run if size == 1 else _blocks(run, size)


def _blocks(run: Run, size: int) -> Run:
    """The blocks of `size` from the first to the last that hold indices of `run`."""
    return Run.span(run.start // size, -(-run.stop // size) - run.start // size)


def _box(shape: Shape, runs: Sequence[Run]) -> Transfer:
    return Transfer(0, shape, tuple(Axis(None, dim, run, run) for dim, run in enumerate(runs)))


def sizes_of(part: Transfer) -> list[int]:
    """The number of elements of `part` along each dimension of the tensor."""
    return [run.size for run in runs_of(part)]
