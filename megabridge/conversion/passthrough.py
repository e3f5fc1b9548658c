"""Passthrough tensors: those of multi-token-prediction layers that a model was built without and that its exports include.

They stay in files: the imported ones, or a copy beside a native checkpoint. The files are held open, so that an export can read
them even after they were removed. In the plan of an export each tensor is an additional parameter, whole on one rank, whose
elements are read when they are written; quantised tensors are decoded into a file first.
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

FOLDER: Final = "passthrough"
"""Folder in a native checkpoint's assets."""


@dataclass(frozen=True)
class Passthrough:
    """The tensors by name, with open files; `digests` are those that a native checkpoint recorded."""

    infos: Mapping[str, TensorInfo] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    reader: Reader = field(default_factory=lambda: Reader(()))

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo], digests: Mapping[str, str] | None = None) -> Self:
        """Opens the tensors' files. Raises CheckpointError where one was replaced since its header was read."""
        reader = Reader(infos.values())
        reader.open_all()
        return cls(infos, digests or {}, reader)

    def close(self) -> None:
        """Closes the files; mappings live on until nothing uses them."""
        self.reader.close()

    def tensor(self, name: str) -> torch.Tensor:
        """Returns an unquantised tensor as a view of the mapped file. Raises CheckpointError where it has changed."""
        info = self.infos[name]
        self.check(info)
        found = self.reader.box(info, whole(info.shape)).reshape(info.shape)
        if name in self.digests and manifest.digest(found) != self.digests[name]:
            raise CheckpointError(f"{info.file} must be as it was saved, but {name} has other bytes; use another step.")
        return found

    def check(self, info: TensorInfo) -> None:
        """Raises CheckpointError where the tensor's file was written to since it was opened."""
        try:
            self.reader.check(info.file)
        except CheckpointError as error:
            raise CheckpointError(
                f"{info.name} is in no parameter, so exports copy it from {info.file}, which has been written to since "
                f"({error}); load the model again from a folder that doesn't change."
            ) from error


@dataclass(frozen=True, eq=False)
class PassthroughParameter(LocalParameter):
    """A tensor of a file that stands in for a parameter."""

    passthrough: Passthrough

    @property
    @override
    def data(self) -> torch.Tensor:
        return self.passthrough.tensor(self.name)


def with_passthrough(plan: Plan, passthrough: Passthrough, scratch: Path) -> Plan:
    """Returns `plan` with the tensors of `passthrough` that the model was built without, assigned to the ranks in turn. Collective.

    `passthrough` has the same tensors on every rank. Quantised tensors are decoded into an unnamed file in the folder `scratch`,
    which lives as long as the plan. Raises the same CheckpointError on every rank if a tensor can't be read or `scratch` is full.
    """
    infos = passthrough.infos
    names = sorted((name for name in infos if plan.is_passthrough(name)), key=natural)
    if not names:
        return plan
    tensors = dict(plan.tensors) | {name: TensorSpec(infos[name].shape, infos[name].dtype) for name in names}
    sources, items = dict(plan.sources), list(plan.items)
    with collectives.raise_together("reading the weights of multi-token prediction"):
        decoded = _decoded(passthrough, names[collectives.rank() :: collectives.world_size()], scratch)
    for number, name in enumerate(names):
        info, owner = infos[name], number % collectives.world_size()
        move = whole(info.shape)
        sources[name] = (WrittenBox(owner, name, move),)
        if owner == collectives.rank():
            record = ParameterRecord(name, info.shape, info.dtype, (), is_writer=True)
            parameter = (
                LocalParameter(record, name, -1, decoded[name])
                if name in decoded
                else PassthroughParameter(record, name, -1, torch.empty(0), passthrough)
            )
            items.append(LocalItem(record, (name,), (info.shape,), (move,), False, parameter))
    return replace(
        plan, items=tuple(items), tensors={name: tensors[name] for name in sorted(tensors, key=natural)}, sources=sources
    )


def _decoded(passthrough: Passthrough, names: Sequence[str], scratch: Path) -> dict[str, torch.Tensor]:
    """Decodes the quantised tensors of `names` into one unnamed file in `scratch`."""
    encoded = [info for name in names if (info := passthrough.infos[name]).encoding is not None]
    if not encoded:
        return {}
    folders.make_parents(scratch / "export")
    with file_backed(scratch):
        memory = torch.empty(sum(info.elements for info in encoded), dtype=torch.bfloat16)
    out, buffer, reader = {}, torch.empty(PIECE, dtype=torch.uint8), passthrough.reader
    for info, flat in zip(encoded, torch.split(memory, [info.elements for info in encoded]), strict=True):
        out[info.name] = flat.view(info.shape)
        for part in reader.parts(info, whole(info.shape)):
            native_box(out[info.name], part).copy_(reader.fetch(info, part, lambda: buffer).box)
        passthrough.check(info)
    return out


def write(folder: Path, passthrough: Passthrough) -> None:
    """Copies the tensors into `folder`/passthrough, with their digests. One rank calls it.

    Raises CheckpointError where they can't be read or written.
    """
    target, infos = folder / FOLDER, passthrough.infos
    names = sorted(infos, key=natural)
    shards = plan_shards(target, {name: TensorSpec(infos[name].shape, infos[name].dtype) for name in names})
    written = {name: info for shard in shards for name, info in shard.tensors.items()}
    reserve(target, shards)
    with Writer() as writer:
        for name, info in written.items():
            data = passthrough.tensor(name) if infos[name].encoding is None else _decoded(passthrough, [name], target)[name]
            writer.write(info, (whole(info.shape),), data)
            passthrough.check(infos[name])
        writer.sync()
    write_index(target, shards)
    manifest.write(target, written, manifest.digests(written.values()), None)


def read(folder: Path) -> Passthrough | None:
    """Opens the tensors in `folder`/passthrough; None where there is no such folder. Raises CheckpointError for damaged files."""
    target = folder / FOLDER
    if not target.is_dir():
        return None
    infos = find_tensors(target)
    if not (target / manifest.MANIFEST).is_file():
        return Passthrough.of(infos)  # written by an earlier version
    said = manifest.read(target).tensors
    wrong = [name for name in infos.keys() | said.keys() if name not in infos or name not in said
             or manifest.entry_of(infos[name], said[name].xxh3_128) != said[name]]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{target} must hold the tensors that were saved in it; use another step:\n  {listed(sorted(wrong))}")
    return Passthrough.of(infos, {name: entry.xxh3_128 for name, entry in said.items()})
