"""Counts calls of torch.distributed, for measurements.

Stands for functions of torch/distributed/distributed_c10d.py while entered, and hands every call on. Names of torch 2.11 and later.
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
    """Calls of torch.distributed inside `counted`: those that carry Python objects, and those that carry tensors."""

    objects: int = 0
    tensors: int = 0

    def _called(self, kind: str, original: Any, *arguments: Any, **options: Any) -> Any:
        setattr(self, kind, getattr(self, kind) + 1)
        return original(*arguments, **options)


@contextmanager
def counted() -> Iterator[Collectives]:
    """Counts collectives that this rank calls inside. Each costs a function call more; don't time what is inside."""
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
