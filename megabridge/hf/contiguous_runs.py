"""Contiguous runs: the parts of a box that are contiguous both in a file and in a parameter, without listing elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megabridge.mapping import Transfer

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ContiguousRuns:
    """A box as runs of `length` elements, with the offset of each in the flat Hugging Face tensor and in the parameter's memory."""

    length: int
    hf: Offsets
    native: Offsets

    def adjacent(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (start in the Hugging Face tensor, starts in the parameter) for runs that are adjacent in the former."""
        breaks = np.flatnonzero(np.diff(self.hf) != self.length) + 1
        for starts, natives in zip(np.split(self.hf, breaks), np.split(self.native, breaks), strict=True):
            yield int(starts[0]), natives.tolist()


def contiguous_runs(transfer: Transfer, native_strides: tuple[int, ...]) -> ContiguousRuns:
    """Returns the runs of `transfer` that are contiguous on both sides, for a parameter with these strides, in elements."""
    sizes, native, native_start = transfer.native_view(native_strides)
    _, hf, hf_start = transfer.hf_view()
    length, outer = innermost_contiguous(sizes, hf, native)
    return ContiguousRuns(
        length, offsets(sizes[:outer], hf[:outer], hf_start), offsets(sizes[:outer], native[:outer], native_start)
    )


def innermost_contiguous(sizes: list[int], *sides: list[int]) -> tuple[int, int]:
    """Returns the elements in the innermost dimensions that are contiguous by the strides of all `sides`, and the number of
    dimensions before them."""
    length, outer = 1, len(sizes)
    while outer and (sizes[outer - 1] == 1 or all(strides[outer - 1] == length for strides in sides)):
        outer -= 1
        length *= sizes[outer]
    return length, outer


def offsets(sizes: list[int], strides: list[int], start: int) -> Offsets:
    """Returns the offset of every element of the box, in order."""
    out = np.array([start], dtype=np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        if size > 1:
            out = (out[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return out


def hf_length(transfer: Transfer) -> int:
    """Number of elements of one contiguous run of the Hugging Face side."""
    sizes, strides, _ = transfer.hf_view()
    return innermost_contiguous(sizes, strides)[0]


def span_of(transfer: Transfer) -> int:
    """Number of elements from the first to the last of the Hugging Face side, including those between runs."""
    sizes, strides, _ = transfer.hf_view()
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def narrow(transfer: Transfer, most: int) -> Iterator[Transfer]:
    """Splits `transfer` into parts whose Hugging Face side spans at most `most` elements."""
    if transfer.elements == 1 or span_of(transfer) <= most:
        yield transfer
        return
    for part in transfer.split((transfer.elements + 1) // 2):
        yield from narrow(part, most)
