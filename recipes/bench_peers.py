"""Peers against which conversion is measured: plain copies and writes, transformers, and conversion of whole tensors.

`import_whole` and `export_whole` follow the pattern of NVIDIA's Megatron Bridge
(megatron/bridge/models/conversion/param_mapping.py): every rank reads whole tensors and the first scatters them; an export sends
each parameter's metadata as an object and its shards to all ranks, and rank 0 saves. They use our layouts, so that they move the
same elements.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

import megabridge.platform as platform
from megabridge.conversion.parameters import ParameterRecord
from megabridge.conversion.plan import Expansion, LocalItem, Plan
from megabridge.conversion.shards import Shard
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import native_box, view
from megabridge.mapping import Transfer
from megabridge.parallel.topology import Topology

BLOCK: Final = 256 << 20  # bytes of the buffer that plain copies and writes read from: larger than any cache
PIECE: Final = 8 << 20


def block(size: int, device: torch.device) -> torch.Tensor:
    """Returns filled host memory to copy or write from, at most `size` bytes; pinned if the device is a GPU."""
    made = torch.empty(max(1, min(size, BLOCK)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    return made.fill_(7)


def copy(source: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """Copies `size` bytes to new memory of `device`."""
    target = torch.empty(size, dtype=torch.uint8, device=device)
    for start in range(0, size, source.numel()):
        piece = target[start : start + source.numel()]
        piece.copy_(source[: piece.numel()], non_blocking=True)
    return target


def write(source: torch.Tensor, size: int, file: Path) -> None:
    """Writes `size` bytes to a new file and syncs it to disk."""
    data = memoryview(source.numpy())
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        done = 0
        while done < size:
            start = done % len(data)
            done += os.write(fd, data[start : start + min(PIECE, size - done)])
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_files(folder: Path) -> None:
    """Syncs files that another library wrote to disk, as our exports are."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


@dataclass
class Groups:
    """This rank's tensor and pipeline groups for the peers' collectives. Every rank makes one."""

    topology: Topology
    tp: Any = field(init=False)
    pp: Any = field(init=False)
    tp_ranks: list[int] = field(init=False)
    pp_ranks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        sizes, own = self.topology, dist.get_rank()
        for pp in range(sizes.pp):
            for dp in range(sizes.dp):
                ranks = [sizes.rank(tp=tp, pp=pp, dp=dp) for tp in range(sizes.tp)]
                group = dist.new_group(ranks)
                if own in ranks:
                    self.tp, self.tp_ranks = group, ranks
        for tp in range(sizes.tp):
            for dp in range(sizes.dp):
                ranks = [sizes.rank(tp=tp, pp=pp, dp=dp) for pp in range(sizes.pp)]
                group = dist.new_group(ranks)
                if own in ranks:
                    self.pp, self.pp_ranks = group, ranks


def _moves(plan: Plan, record: ParameterRecord) -> tuple[tuple[str, ...], tuple[Transfer, ...]]:
    """Returns the tensors of a whole, uncut parameter, and its transfers."""
    entry = Expansion(plan.family, plan.dims).entry(replace(record, cuts=()))
    return entry.hf, entry.transfers


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)  # not every backend knows every dtype


@torch.no_grad()
def import_whole(plan: Plan, infos: Mapping[str, TensorInfo], groups: Groups) -> int:
    """Fills the parameters: every rank reads whole tensors, the first of each group scatters them. Returns the bytes read."""
    read = 0
    first = groups.tp_ranks[0] == dist.get_rank()
    files: dict[Path, Any] = {}
    for item in plan.items:
        record, target = item.record, item.local.data
        names, moves = _moves(plan, record)
        tensors = []
        for name in names:
            info = infos[name]
            if info.file not in files:
                files[info.file] = safe_open(str(info.file), framework="pt")
            tensors.append(files[info.file].get_tensor(name).to(target.device))
            read += info.nbytes
        whole = torch.zeros(record.shape, dtype=target.dtype, device=target.device) if first else None
        if whole is not None:
            for move in moves:
                native_box(whole, move).copy_(view(tensors[move.part], move.hf_view()))
        _scatter(record, whole, target, groups)
    return read


def _scatter(record: ParameterRecord, whole: torch.Tensor | None, target: torch.Tensor, groups: Groups) -> None:
    received = torch.empty_like(target, memory_format=torch.contiguous_format) if whole is None or record.cuts else whole
    cut = record.cuts[0] if record.cuts else None
    if cut is None:
        if len(groups.tp_ranks) > 1:
            dist.broadcast(_bytes(received), groups.tp_ranks[0], group=groups.tp)
    else:
        shares = None
        if whole is not None:
            every = [type(cut)(cut.dim, cut.stride, cut.size, index).segments(record.shape[cut.dim]) for index in range(cut.size)]
            shares = [
                torch.cat([whole.narrow(cut.dim, start, stop - start) for start, stop, _ in segments], cut.dim)
                for segments in every
            ]
        dist.scatter(_bytes(received), shares and [_bytes(share) for share in shares], src=groups.tp_ranks[0], group=groups.tp)
    target.copy_(received)


@torch.no_grad()
def export_whole(plan: Plan, shards: list[Shard], groups: Groups) -> None:
    """Writes `shards`: each parameter is sent to all ranks, its metadata first; rank 0 saves the tensors and syncs them to disk."""
    held = {item.record.name: item for item in plan.items}
    names: list[Any] = [None] * len(groups.pp_ranks)
    dist.all_gather_object(names, [item.record.name for item in plan.items if not item.is_tied_copy], group=groups.pp)
    found: dict[str, torch.Tensor] = {}
    for owner, stage in zip(groups.pp_ranks, names, strict=True):
        for name in stage:
            record, shard = _from_stage(held[name] if owner == dist.get_rank() else None, owner, groups)
            found |= _put_together(plan, record, _joined(record, shard, groups))
    if dist.get_rank() == 0:
        for each in shards:
            file = next(iter(each.tensors.values())).file
            file.parent.mkdir(exist_ok=True)
            save_file({name: found[name].cpu() for name in each.tensors}, file, metadata={"format": "pt"})
        sync_files(file.parent)


def _from_stage(item: LocalItem | None, owner: int, groups: Groups) -> tuple[ParameterRecord, torch.Tensor]:
    """Sends a parameter of one stage to all stages: its shape, its record, then its elements. `item` is None on the others."""
    if len(groups.pp_ranks) == 1:
        assert item is not None
        return item.record, item.local.data
    shapes: list[Any] = [None] * len(groups.pp_ranks)
    dist.all_gather_object(shapes, None if item is None else tuple(item.local.data.shape), group=groups.pp)
    packed = [None if item is None else item.record]
    dist.broadcast_object_list(packed, src=owner, group=groups.pp)
    record = packed[0]
    assert record is not None
    shape = next(shape for shape in shapes if shape is not None)
    shard = torch.empty(shape, dtype=record.dtype, device=platform.device()) if item is None else item.local.data.contiguous()
    dist.broadcast(_bytes(shard), owner, group=groups.pp)
    return record, shard


def _joined(record: ParameterRecord, shard: torch.Tensor, groups: Groups) -> torch.Tensor:
    cut = record.cuts[0] if record.cuts else None
    if cut is None:
        return shard
    shards = [torch.empty_like(shard) for _ in range(cut.size)]
    dist.all_gather([_bytes(each) for each in shards], _bytes(shard.contiguous()), group=groups.tp)
    whole = torch.empty(record.shape, dtype=shard.dtype, device=shard.device)
    for index, each in enumerate(shards):
        for start, stop, local in type(cut)(cut.dim, cut.stride, cut.size, index).segments(record.shape[cut.dim]):
            whole.narrow(cut.dim, start, stop - start).copy_(each.narrow(cut.dim, local, stop - start))
    return whole


def _put_together(plan: Plan, record: ParameterRecord, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    names, moves = _moves(plan, record)
    out = {name: torch.empty(plan.tensors[name].shape, dtype=whole.dtype, device=whole.device) for name in names}
    for move in moves:
        view(out[names[move.part]], move.hf_view()).copy_(native_box(whole, move))
    return out
