"""Tensors that a model was built without and that come back with its export: those of multi-token-prediction layers.

They stay in files: the imported ones, or a copy of them beside a native checkpoint. These are held open, so that an export finds
them also where their names are gone. In the plan of an export each is one more parameter, whole on one rank, whose elements are
read when they are written; quantised ones are decoded into a file before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Self, override

import torch

from megabridge.conversion import manifest
from megabridge.conversion.file_writer import Writer, reserve, write_index
from megabridge.conversion.parameters import LocalParameter, ParameterRecord
from megabridge.conversion.plan import LocalItem, Plan, TensorSpec, WrittenBox
from megabridge.conversion.shards import plan_shards
from megabridge.errors import CheckpointError, listed
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import PIECE, Reader, find_tensors, native_box
from megabridge.mapping import natural, whole
from megabridge.parallel import collectives
from megabridge.platform.file_backed import file_backed
from megabridge.storage import folders

FOLDER: Final = "carried"
"""Of a native checkpoint's assets."""


@dataclass(frozen=True)
class Passthrough:
    """The tensors by name; `digests` are of those that came out of a native checkpoint."""

    infos: Mapping[str, TensorInfo] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    reader: Reader = field(default_factory=lambda: Reader(()))

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo], digests: Mapping[str, str] | None = None) -> Self:
        """Opens the tensors' files. Raises CheckpointError where they aren't what their headers were read from."""
        reader = Reader(infos.values())
        reader.open_all()
        return cls(infos, digests or {}, reader)

    def close(self) -> None:
        """Closes the files; what was mapped stays until it is used no more."""
        self.reader.close()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that isn't quantised, as a view of the mapped file. Raises CheckpointError where it is not what it was."""
        info = self.infos[name]
        self.check(info)
        found = self.reader.box(info, whole(info.shape)).reshape(info.shape)
        if name in self.digests and manifest.digest(found) != self.digests[name]:
            raise CheckpointError(f"{info.file} must hold what was saved in it, but {name} has other bytes; use another step.")
        return found

    def check(self, info: TensorInfo) -> None:
        """Raises CheckpointError where a file was written since it was opened."""
        try:
            self.reader.check(info.file)
        except CheckpointError as error:
            raise CheckpointError(
                f"{info.name} is in no parameter and comes back with every export from {info.file}, but that was written meanwhile "
                f"({error}); load the model again from a folder that stays as it is."
            ) from error


@dataclass(frozen=True, eq=False)
class PassthroughParameter(LocalParameter):
    """A tensor of a file in the place of a parameter."""

    carried: Passthrough

    @property
    @override
    def data(self) -> torch.Tensor:
        return self.carried.tensor(self.name)


def with_passthrough(plan: Plan, carried: Passthrough, scratch: Path) -> Plan:
    """`plan` with those tensors of `carried` that it carries; the ranks write them in turn. Collective.

    They are the same on every rank. What a rank decodes is in the folder `scratch`, without a name, until the plan goes. Raises
    CheckpointError where it can't be read, or has no room there; the same on every rank.
    """
    infos = carried.infos
    names = sorted((name for name in infos if plan.is_passthrough(name)), key=natural)
    if not names:
        return plan
    tensors = dict(plan.tensors) | {name: TensorSpec(infos[name].shape, infos[name].dtype) for name in names}
    sources, items = dict(plan.sources), list(plan.items)
    with collectives.raise_together("reading the weights of multi-token prediction"):
        decoded = _decoded(carried, names[collectives.rank() :: collectives.world_size()], scratch)
    for number, name in enumerate(names):
        info, owner = infos[name], number % collectives.world_size()
        move = whole(info.shape)
        sources[name] = (WrittenBox(owner, name, move),)
        if owner == collectives.rank():
            record = ParameterRecord(name, info.shape, info.dtype, (), is_writer=True)
            live = (
                LocalParameter(record, name, -1, decoded[name])
                if name in decoded
                else PassthroughParameter(record, name, -1, torch.empty(0), carried)
            )
            items.append(LocalItem(record, (name,), (info.shape,), (move,), False, live))
    return replace(
        plan, items=tuple(items), tensors={name: tensors[name] for name in sorted(tensors, key=natural)}, sources=sources
    )


def _decoded(carried: Passthrough, names: Sequence[str], scratch: Path) -> dict[str, torch.Tensor]:
    """The quantised ones of `names`, decoded into one file in `scratch` that has no name."""
    encoded = [info for name in names if (info := carried.infos[name]).encoding is not None]
    if not encoded:
        return {}
    folders.make_parents(scratch / "export")
    with file_backed(scratch):
        memory = torch.empty(sum(info.elements for info in encoded), dtype=torch.bfloat16)
    out, buffer, reader = {}, torch.empty(PIECE, dtype=torch.uint8), carried.reader
    for info, flat in zip(encoded, torch.split(memory, [info.elements for info in encoded]), strict=True):
        out[info.name] = flat.view(info.shape)
        for part in reader.parts(info, whole(info.shape)):
            native_box(out[info.name], part).copy_(reader.fetch(info, part, lambda: buffer).box)
        carried.check(info)
    return out


def write(folder: Path, carried: Passthrough) -> None:
    """Copies the tensors into `folder`/carried, with their digests. One rank calls it.

    Raises CheckpointError where they can't be read or written.
    """
    target, infos = folder / FOLDER, carried.infos
    names = sorted(infos, key=natural)
    shards = plan_shards(target, {name: TensorSpec(infos[name].shape, infos[name].dtype) for name in names})
    written = {name: info for shard in shards for name, info in shard.tensors.items()}
    reserve(target, shards)
    with Writer() as writer:
        for name, info in written.items():
            data = carried.tensor(name) if infos[name].encoding is None else _decoded(carried, [name], target)[name]
            writer.write(info, (whole(info.shape),), data)
            carried.check(infos[name])
        writer.sync()
    write_index(target, shards)
    manifest.write(target, written, manifest.digests(written.values()), None)


def read(folder: Path) -> Passthrough | None:
    """The tensors in `folder`/carried; None where there is no such folder. Raises CheckpointError for damaged files."""
    target = folder / FOLDER
    if not target.is_dir():
        return None
    infos = find_tensors(target)
    if not (target / manifest.MANIFEST).is_file():
        return Passthrough.of(infos)  # of an earlier version's
    said = manifest.read(target).tensors
    wrong = [name for name in infos.keys() | said.keys() if name not in infos or name not in said
             or manifest.entry_of(infos[name], said[name].xxh3_128) != said[name]]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{target} must hold the tensors that were saved in it; use another step:\n  {listed(sorted(wrong))}")
    return Passthrough.of(infos, {name: entry.xxh3_128 for name, entry in said.items()})
