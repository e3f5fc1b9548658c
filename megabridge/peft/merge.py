"""Merges adapters into the weights of an export plan (each by adapter.py), so that the exported model needs no adapters."""

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
    """Keeps the last merged weight, since a conversion reads the same one several times in a row."""

    def __init__(self) -> None:
        self._key: Adapter | None = None
        self._weight: Tensor | None = None

    def of(self, adapter: Adapter, scale: Tensor | None) -> Tensor:
        if self._key is not adapter or self._weight is None:
            self._weight = None  # frees the old one before the new one is made
            self._key, self._weight = adapter, adapter.merged(scale)
        return self._weight


@dataclass(frozen=True, eq=False)
class Merged(LocalParameter):
    """A weight with its adapter merged, computed when it is read."""

    adapter: Adapter
    scale: Tensor | None
    cache: MergeCache

    @property
    @override
    def data(self) -> Tensor:
        return self.cache.of(self.adapter, self.scale)


def adapters(chunks: Sequence[torch.nn.Module]) -> list[Adapter]:
    """The adapters of this rank's chunks, in module order."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def with_merged(plan: Plan, chunks: Sequence[torch.nn.Module]) -> Plan:
    """Returns `plan` with the merged weight of every adapted linear; the model isn't changed. Every rank calls it."""
    cache, items = MergeCache(), []
    owners = {id(adapter.weight): adapter for adapter in adapters([unwrap(chunk) for chunk in chunks])}
    scales = {key: adapter.scale() for key, adapter in owners.items()}
    for item in plan.items:
        adapter = owners.get(id(item.local.parameter))
        if adapter is not None:
            own = item.local
            merged = Merged(own.record, own.local, own.chunk, own.parameter, adapter, scales[id(own.parameter)], cache)
            item = replace(item, local=merged)
        items.append(item)
    return replace(plan, items=tuple(items))
