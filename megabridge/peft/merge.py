"""Merged weights in the place of a plan's own: an export of an adapted model that needs no adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import override

import torch
from torch import Tensor

from megabridge.conversion.parameters import LocalParameter, unwrap
from megabridge.conversion.plan import Plan
from megabridge.peft.adapter import Adapter


class MergeCache:
    """The merged weight that was asked for last: a walk asks for the same one several times in a row."""

    def __init__(self) -> None:
        self._key: Adapter | None = None
        self._weight: Tensor | None = None

    def of(self, adapter: Adapter, scale: Tensor | None) -> Tensor:
        if self._key is not adapter or self._weight is None:
            self._weight = None  # first: two of the largest would be held otherwise
            self._key, self._weight = adapter, adapter.merged(scale)
        return self._weight


@dataclass(frozen=True, eq=False)
class Merged(LocalParameter):
    """A weight with its adapter added, made anew whenever it is asked for."""

    adapter: Adapter
    scale: Tensor | None
    last: MergeCache

    @property
    @override
    def data(self) -> Tensor:
        return self.last.of(self.adapter, self.scale)


def adapters(chunks: Sequence[torch.nn.Module]) -> list[Adapter]:
    """The adapters of this rank's chunks, in module order."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def with_merged(plan: Plan, chunks: Sequence[torch.nn.Module]) -> Plan:
    """`plan` with the merged weight of every adapted linear; the model isn't changed. Every rank calls it."""
    last, items = MergeCache(), []
    owners = {id(adapter.weight): adapter for adapter in adapters([unwrap(chunk) for chunk in chunks])}
    scales = {key: adapter.scale() for key, adapter in owners.items()}
    for item in plan.items:
        adapter = owners.get(id(item.local.parameter))
        if adapter is not None:
            own = item.local
            merged = Merged(own.record, own.local, own.chunk, own.parameter, adapter, scales[id(own.parameter)], last)
            item = replace(item, local=merged)
        items.append(item)
    return replace(plan, items=tuple(items))
