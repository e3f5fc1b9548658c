"""Counts calls of torch.distributed, for measurements.

Replaces functions of torch/distributed/distributed_c10d.py within the block, and forwards every call. torch 2.11 and later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch.distributed as dist

from megabridge.platform import patches

OBJECTS: Final = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")
TENSORS: Final = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "gather", "scatter", "reduce", "send", "recv",
                  "isend", "irecv", "all_to_all", "all_to_all_single", "reduce_scatter_tensor", "barrier")  # fmt: skip


@dataclass
class Collectives:
    """Number of calls of torch.distributed inside `counted`: those that send Python objects, and those that send tensors."""

    objects: int = 0
    tensors: int = 0

    def _called(self, kind: str, original: Any, *arguments: Any, **options: Any) -> Any:
        setattr(self, kind, getattr(self, kind) + 1)
        return original(*arguments, **options)


@contextmanager
def counted() -> Iterator[Collectives]:
    """Counts the collectives that this rank calls in the block. Each costs an additional function call: don't time the block."""
    patches.check_torch(__name__)
    found = Collectives()
    originals = {name: getattr(dist, name) for name in (*OBJECTS, *TENSORS)}
    try:
        for name, original in originals.items():
            setattr(dist, name, partial(found._called, "objects" if name in OBJECTS else "tensors", original))
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
