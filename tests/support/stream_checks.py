"""Checks of streamed weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from megabridge.mapping import natural
from megabridge.parallel.topology import Topology
from tests.support.payload import payload


def files(folder: Path) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Name, dtype, shape and digest of a folder's tensors, in an export's order."""
    found = payload(folder)
    return [(name, *found[name][:2], hashlib.sha256(found[name][2]).hexdigest()) for name in sorted(found, key=natural)]


def check_tasks(tasks: list[Any], expected: list[Any], layout: Topology) -> None:
    assert [task[:3] for task in tasks] == [entry[:3] for entry in expected]
    for name, _, shape, nbytes, natives, sources in tasks:
        assert nbytes == 4 * torch.Size(shape).numel()
        assert len(natives) == 1 and set(sources) <= set(range(layout.world_size))
        if name.endswith("v_proj.weight"):
            assert natives[0].endswith("linear_qkv.weight")
        if name.endswith("down_proj.weight"):
            assert natives[0].endswith("linear_fc2.weight") and len(sources) == layout.tp
