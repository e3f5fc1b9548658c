"""Comparison: a model's parameters against the tensors of a folder, bit for bit, box by box. No gather."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from megabridge import agreement
from megabridge.checkpoint.hf import STAGING, Reader, native_box
from megabridge.checkpoint.safetensors import TensorInfo
from megabridge.conversion.plan import Item, Plan
from megabridge.mapping import Transfer

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


Cast = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Difference:
    """What a comparison found over all ranks: names of tensors that differ, the largest difference of a value, bytes compared."""

    mismatched: tuple[str, ...]
    max_abs: float
    bytes_compared: int


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape have equal bits (NaNs and signed zeros included)."""
    kind = _INTEGERS[ours.element_size()]
    return torch.equal(ours.contiguous().view(kind), theirs.contiguous().view(kind))


def compare(plan: Plan, infos: Mapping[str, TensorInfo], cast: Cast, *, absent: frozenset[str] = frozenset()) -> Difference:
    """Compares every copy of every parameter with its boxes. Collective: every rank gets the same answer.

    `cast(ours, theirs)` brings a pair of boxes to one dtype: after an import the file's is cast to the parameter's, after an export
    the other way round. Tensors in `absent` are left out; aliases that the folder has are compared too.
    """
    names: set[str] = set()
    largest, seen = 0.0, 0
    with agreement.together("comparing weights"), Reader(infos.values()) as reader:
        for item, transfer, info in _boxes(plan, infos, absent):
            differs, distance = _compare_box(reader, info, item.live.data, transfer, cast)
            seen += transfer.elements * info.dtype.itemsize
            if differs:
                names.add(info.name)
                largest = max(largest, distance)
        reader.finish()
    found = agreement.gather((names, largest, seen))
    merged = sorted(set().union(*(entry[0] for entry in found)))
    return Difference(tuple(merged), max(entry[1] for entry in found), sum(entry[2] for entry in found))


def _boxes(plan: Plan, infos: Mapping[str, TensorInfo], absent: frozenset[str]) -> list[tuple[Item, Transfer, TensorInfo]]:
    out = []
    for item in plan.items:
        for transfer in item.transfers:
            name = item.hf[transfer.part]
            same = [name] if name not in absent else []
            same += [alias for alias, target in plan.aliases.items() if target == name and alias in infos]
            out += [(item, transfer, infos[tensor]) for tensor in same]
    return out


def _compare_box(
    reader: Reader,
    info: TensorInfo,
    source: torch.Tensor,
    transfer: Transfer,
    cast: Cast,
) -> tuple[bool, float]:
    differs, largest = False, 0.0
    for part in transfer.split(STAGING):
        if part.elements == 0:
            continue
        ours, theirs = cast(native_box(source, part).cpu(), reader.box(info, part))
        if not same_bits(ours, theirs):
            differs = True
            distance = (ours.double() - theirs.double()).abs().max().item()
            largest = float("inf") if distance != distance else max(largest, distance)
    return differs, largest


def to_native(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The file's box as the parameter's dtype."""
    return ours, theirs.to(ours.dtype)


def to_file(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameter's box as the file's dtype."""
    return ours.to(theirs.dtype), theirs
