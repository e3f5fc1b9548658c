"""Checking a published folder: against its manifest, and against a source. No model is built and one process is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megabridge import agreement
from megabridge.checkpoint import assets
from megabridge.checkpoint.hf import PIECE, Reader, find_tensors
from megabridge.checkpoint.quantised import find_weights
from megabridge.checkpoint.safetensors import TensorInfo, read_header
from megabridge.conversion import manifest
from megabridge.conversion.compare import same_bits
from megabridge.conversion.manifest import Manifest
from megabridge.errors import CheckpointError
from megabridge.families import family_for
from megabridge.mapping import natural, whole


def against_manifest(folder: Path) -> list[str]:
    """Every way in which `folder` is not what its manifest says, a line each. Collective: ranks share the reading.

    Raises CheckpointError where there is no manifest that can be read.
    """
    with agreement.together("reading the manifest"):
        said = manifest.read(folder)
        found, problems = _headers(folder, said)
        problems += [*_other_files(folder, said), *_entries(found, said)]
        sound = [info for name, info in found.items() if name in said.tensors and _is_same_place(info, said)]
    with agreement.together("taking digests"):
        taken = manifest.digests(manifest.share(sound))
    wrong = [name for name, digest in taken.items() if digest != said.tensors[name].xxh3_128]
    return problems + [f"{said.tensors[name].file}: {name} has other bytes than were written" for name in _everyones(wrong)]


def against_source(folder: Path, source: Path) -> list[str]:
    """Every way in which the tensors of `folder` are not those of `source`, cast to its dtypes, a line each. Collective.

    Tensors that the source's family ignores may be left out. Raises CheckpointError where a folder can't be read.
    """
    with agreement.together("opening both folders"):
        ours, theirs = find_tensors(folder), find_weights(source)
        is_ignored = family_for(assets.read_config(source)).is_ignored
    problems = [f"{name} is not in the source" for name in ours if name not in theirs]
    problems += [f"{name} is missing" for name in theirs if name not in ours and not is_ignored(name)]
    both = [name for name in ours if name in theirs]
    problems += [
        f"{name} is {ours[name].shape}, not {theirs[name].shape}" for name in both if ours[name].shape != theirs[name].shape
    ]
    with agreement.together("comparing tensors"):
        wrong = _differing([ours[name] for name in both if ours[name].shape == theirs[name].shape], theirs)
    return problems + [f"{name} has other values, as {ours[name].dtype}" for name in _everyones(wrong)]


def _differing(ours: list[TensorInfo], theirs: Mapping[str, TensorInfo]) -> list[str]:
    """The tensors of this rank's share that differ from the source's, cast to their dtypes."""
    share = manifest.share(ours)
    found = []
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    with Reader(share) as left, Reader(theirs[info.name] for info in share) as right:
        for info in share:
            other = theirs[info.name]
            pairs = (
                (left.box(info, part), right.fetch(other, part, lambda: buffer).box)
                for part in right.parts(other, whole(info.shape))
            )
            if not all(same_bits(piece, theirs_.to(info.dtype)) for piece, theirs_ in pairs):
                found.append(info.name)
        left.finish()
        right.finish()
    return found


def _headers(folder: Path, said: Manifest) -> tuple[dict[str, TensorInfo], list[str]]:
    """Every tensor in the folder's files, and what is wrong with these files."""
    found: dict[str, TensorInfo] = {}
    problems = []
    for file in sorted({entry.file for entry in said.tensors.values()} | {path.name for path in folder.glob("*.safetensors")}):
        try:
            found |= read_header(folder / file)
        except FileNotFoundError:
            problems.append(f"{file}: the file is missing")
        except CheckpointError as error:
            problems.append(f"{file}: {error}")
    return found, problems


def _other_files(folder: Path, said: Manifest) -> Iterator[str]:
    shards = {entry.file for entry in said.tensors.values()}
    present = {name for name in manifest.other_files(folder) if name not in shards}
    for name, entry in said.files.items():
        if name not in present:
            yield f"{name}: the file is missing"
        elif manifest.file_entry(folder / name) != entry:
            yield f"{name}: the file has other bytes than were written"
    for name in sorted(present - said.files.keys()):
        # Tensors are reported by name; a README that was added later is no damage.
        if manifest.may_hold(name.partition("/")[0]) and not name.endswith(".safetensors"):
            yield f"{name}: the file is not in the manifest"


def _entries(found: Mapping[str, TensorInfo], said: Manifest) -> Iterator[str]:
    files = {info.file.name for info in found.values()}
    for name in sorted(found.keys() - said.tensors.keys(), key=natural):
        yield f"{found[name].file.name}: {name} is not in the manifest"
    for name, entry in said.tensors.items():
        if name not in found:
            if entry.file in files:  # otherwise the whole file is reported
                yield f"{entry.file}: {name} is missing"
        elif not _is_same_place(found[name], said):
            is_ = manifest.entry_of(found[name], entry.xxh3_128)
            yield (
                f"{is_.file}: {name} is {is_.dtype} {is_.shape} at byte {is_.offset}, not {entry.dtype} {entry.shape} at byte "
                f"{entry.offset} of {entry.file}"
            )


def _is_same_place(info: TensorInfo, said: Manifest) -> bool:
    entry = said.tensors[info.name]
    return manifest.entry_of(info, entry.xxh3_128) == entry


def _everyones(names: list[str]) -> list[str]:
    return sorted((name for found in agreement.gather(names) for name in found), key=natural)
