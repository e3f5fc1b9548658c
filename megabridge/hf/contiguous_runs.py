"""Contiguous runs: the parts of a box that are contiguous, in a file and in a parameter, found without listing elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megabridge.mapping import Transfer

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ContiguousRuns:
    """A box as stretches of `length` elements: where each begins in the flat Hugging Face tensor and in the parameter's memory."""

    length: int
    hf: Offsets
    native: Offsets

    def gathered(self) -> Iterator[tuple[int, list[int]]]:
        """(start in the Hugging Face tensor, starts in the parameter) of stretches that follow one another in the former."""
        breaks = np.flatnonzero(np.diff(self.hf) != self.length) + 1
        for starts, natives in zip(np.split(self.hf, breaks), np.split(self.native, breaks), strict=True):
            yield int(starts[0]), natives.tolist()


def contiguous_runs(transfer: Transfer, native_strides: tuple[int, ...]) -> ContiguousRuns:
    """What of `transfer` is contiguous on both sides, for a parameter of these strides; offsets are in elements."""
    sizes, native, native_start = transfer.native_view(native_strides)
    _, hf, hf_start = transfer.hf_view()
    length, outer = innermost_contiguous(sizes, hf, native)
    return ContiguousRuns(
        length, offsets(sizes[:outer], hf[:outer], hf_start), offsets(sizes[:outer], native[:outer], native_start)
    )


def innermost_contiguous(sizes: list[int], *sides: list[int]) -> tuple[int, int]:
    """(elements, dimensions before them) of the innermost dimensions that are contiguous by the strides of all `sides`."""
    length, outer = 1, len(sizes)
    while outer and (sizes[outer - 1] == 1 or all(strides[outer - 1] == length for strides in sides)):
        outer -= 1
        length *= sizes[outer]
    return length, outer


def offsets(sizes: list[int], strides: list[int], start: int) -> Offsets:
    """The offset of every element of the box, in order."""
    out = np.array([start], dtype=np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        if size > 1:
            out = (out[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return out


def hf_length(transfer: Transfer) -> int:
    """Elements of one contiguous stretch of the Hugging Face side."""
    sizes, strides, _ = transfer.hf_view()
    return innermost_contiguous(sizes, strides)[0]


def span_of(transfer: Transfer) -> int:
    """Elements from the first to the last of the Hugging Face side, those between stretches included."""
    sizes, strides, _ = transfer.hf_view()
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def narrow(transfer: Transfer, most: int) -> Iterator[Transfer]:
    """`transfer` in parts whose Hugging Face side spans at most `most` elements."""
    if transfer.elements == 1 or span_of(transfer) <= most:
        yield transfer
        return
    for part in transfer.split((transfer.elements + 1) // 2):
        yield from narrow(part, most)
