"""Tensors that a model was built without and that come back with its export: those of multi-token-prediction layers.

They stay in files: the imported ones, or a copy of them beside a native checkpoint. In the plan of an export each is one more
parameter, whole on one rank, whose elements are read when they are written; quantised ones are decoded into a file before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, override

import torch

from megabridge import agreement
from megabridge.checkpoint import folders
from megabridge.checkpoint.hf import PIECE, Reader, find_tensors, native_box
from megabridge.checkpoint.safetensors import TensorInfo
from megabridge.conversion.native import Live, Record
from megabridge.conversion.plan import Item, Plan, Source, Spec
from megabridge.conversion.writer import Writer, plan_shards, reserve, write_index
from megabridge.mapping import natural, whole
from megabridge.platform.file_backed import file_backed

FOLDER: Final = "carried"
"""Of a native checkpoint's assets."""


@dataclass(frozen=True, eq=False)
class InFile(Live):
    """A tensor of a file in the place of a parameter."""

    info: TensorInfo
    reader: Reader

    @property
    @override
    def data(self) -> torch.Tensor:
        """The elements, as a view of the mapped file."""
        return self.reader.box(self.info, whole(self.info.shape)).reshape(self.info.shape)


def with_carried(plan: Plan, infos: Mapping[str, TensorInfo], scratch: Path) -> Plan:
    """`plan` with those tensors of `infos` that it carries; the ranks write them in turn. Collective.

    `infos` are the same on every rank. What a rank decodes is in the folder `scratch`, without a name, until the plan goes.
    Raises CheckpointError where it can't be read, or has no room there; the same on every rank.
    """
    names = sorted((name for name in infos if plan.is_carried(name)), key=natural)
    if not names:
        return plan
    tensors = dict(plan.tensors) | {name: Spec(infos[name].shape, infos[name].dtype) for name in names}
    sources, items = dict(plan.sources), list(plan.items)
    reader = Reader(infos.values())
    with agreement.together("reading the weights of multi-token prediction"):
        decoded = _decoded(reader, [infos[name] for name in names[agreement.rank() :: agreement.world_size()]], scratch)
    for number, name in enumerate(names):
        info, owner = infos[name], number % agreement.world_size()
        move = whole(info.shape)
        sources[name] = (Source(owner, name, move),)
        if owner == agreement.rank():
            record = Record(name, info.shape, info.dtype, (), is_writer=True)
            live = (
                Live(record, name, -1, decoded[name]) if name in decoded else InFile(record, name, -1, torch.empty(0), info, reader)
            )
            items.append(Item(record, (name,), (info.shape,), (move,), False, live))
    return replace(
        plan, items=tuple(items), tensors={name: tensors[name] for name in sorted(tensors, key=natural)}, sources=sources
    )


def _decoded(reader: Reader, infos: Sequence[TensorInfo], scratch: Path) -> dict[str, torch.Tensor]:
    """The quantised ones of `infos`, decoded into one file in `scratch` that has no name."""
    encoded = [info for info in infos if info.encoding is not None]
    if not encoded:
        return {}
    folders.make_parents(scratch / "export")
    with file_backed(scratch):
        memory = torch.empty(sum(info.elements for info in encoded), dtype=torch.bfloat16)
    out, buffer = {}, torch.empty(PIECE, dtype=torch.uint8)
    for info, flat in zip(encoded, torch.split(memory, [info.elements for info in encoded]), strict=True):
        out[info.name] = flat.view(info.shape)
        for part in reader.parts(info, whole(info.shape)):
            native_box(out[info.name], part).copy_(reader.fetch(info, part, lambda: buffer).box)
    return out


def write(folder: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Copies the tensors into `folder`/carried. One rank calls it. Raises CheckpointError where they can't be read or written."""
    target = folder / FOLDER
    names = sorted(infos, key=natural)
    shards = plan_shards(target, {name: Spec(infos[name].shape, infos[name].dtype) for name in names})
    reserve(target, shards)
    with Reader(infos.values()) as reader, Writer() as writer:
        for info in (info for shard in shards for info in shard.tensors.values()):
            source = infos[info.name]
            if source.encoding is None:
                data = reader.box(source, whole(info.shape)).reshape(info.shape)
            else:
                data = _decoded(reader, [source], target)[info.name]
            writer.write(info, (whole(info.shape),), data)
        reader.finish()
        writer.sync()
    write_index(target, shards)


def read(folder: Path) -> dict[str, TensorInfo]:
    """The tensors in `folder`/carried; none where there is no such folder. Raises CheckpointError for damaged files."""
    return find_tensors(folder / FOLDER) if (folder / FOLDER).is_dir() else {}
