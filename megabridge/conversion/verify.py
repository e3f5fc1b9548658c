"""Checks a published folder against its manifest, and against a source. No model is built, and one process is enough."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megabridge.conversion import manifest
from megabridge.conversion.compare import same_bits
from megabridge.conversion.encoding import Encoder, raise_to
from megabridge.conversion.manifest import Manifest
from megabridge.errors import CheckpointError
from megabridge.families import family_for
from megabridge.families.core.quantization import Quantization, quantization_of
from megabridge.hf import assets
from megabridge.hf.codecs import BlockFP8
from megabridge.hf.quantised_weights import SCALE_OF, find_weights
from megabridge.hf.safetensors_format import TensorInfo, read_header
from megabridge.hf.tensor_files import PIECE, Reader, find_tensors, view
from megabridge.mapping import Transfer, natural, whole
from megabridge.parallel import collectives
from megabridge.storage.inside_folder import inside


def against_manifest(folder: Path) -> list[str]:
    """Returns a line for each difference between `folder` and its manifest. Collective: the ranks divide the reading.

    Files that the manifest lacks count, unless they are harmless. Raises CheckpointError for a missing or unreadable manifest.
    """
    with collectives.raise_together("reading the manifest"):
        said = manifest.read(folder)
        problems, _ = manifest.unlisted(folder, {*said.paths(), manifest.MANIFEST})
    return problems + differences(folder, said)


def differences(folder: Path, said: Manifest, *, ranks: Sequence[int] | None = None) -> list[str]:
    """Returns a line for each difference between a manifest and the files that it lists. Collective.

    All ranks divide the reading or, if given, only `ranks`.
    """
    found: list[TensorInfo] = []
    problems: list[str] = []
    is_reading = ranks is None or collectives.rank() in ranks
    with collectives.raise_together("reading headers and other files"):
        if is_reading:
            found, problems = _headers(folder, said)
            problems += [*_other_files(folder, said), *_entries(found, said)]
        sound = [info for info in found if info.name in said.tensors and _is_same_place(info, said)]
    with collectives.raise_together("taking digests"):
        taken = manifest.digests(manifest.share(sound, None if ranks is None else {info.name: ranks for info in sound}))
    wrong = [name for name, digest in taken.items() if digest != said.tensors[name].xxh3_128]
    return problems + [f"{said.tensors[name].file}: {name} has other bytes than were written" for name in _of_all_ranks(wrong)]


def against_source(folder: Path, source: Path) -> list[str]:
    """Returns a line for each difference between the tensors of `folder` and those of `source`, cast to its dtypes. Collective.

    Tensors that the source's family ignores may be left out. A quantised source is compared as the bfloat16 that it decodes to; a
    quantised folder must have the values and scales that an export makes of the source. Raises CheckpointError where a folder can't
    be read.
    """
    with collectives.raise_together("opening both folders"):
        ours, theirs = find_tensors(folder), find_weights(source)
        is_ignored = family_for(assets.read_config(source)).is_ignored
        said = assets.read_config(folder) if (folder / assets.CONFIG).is_file() else {}
        quantization = quantization_of(said)
        scales = {name: ours.pop(name + SCALE_OF) for name in list(ours) if name + SCALE_OF in ours} if quantization else {}
    problems = [f"{name} is not in the source" for name in ours if name not in theirs]
    problems += [f"{name} is missing" for name in theirs if name not in ours and not is_ignored(name)]
    both = [name for name in ours if name in theirs]
    problems += [
        f"{name} is {ours[name].shape}, not {theirs[name].shape}" for name in both if ours[name].shape != theirs[name].shape
    ]
    with collectives.raise_together("comparing tensors"):
        share = manifest.share([ours[name] for name in both if ours[name].shape == theirs[name].shape])
        with Reader([*share, *scales.values()]) as left, Reader(theirs[info.name] for info in share) as right:
            wrong = []
            for info in share:
                other = theirs[info.name]
                encoder = _encoder(right, other, quantization, said) if info.name in scales and quantization else Encoder()
                if not _is_same(left, info, right, other, encoder) or not all(
                    same_bits(left.box(scales[info.name], whole(scale.shape)), view(scale, whole(scale.shape).hf_view()))
                    for _, scale in encoder.scales()
                ):
                    wrong.append(info.name)
            left.finish()
            right.finish()
    return problems + [f"{name} has other values, as {ours[name].dtype}" for name in _of_all_ranks(wrong)]


def _is_same(left: Reader, info: TensorInfo, right: Reader, other: TensorInfo, encoder: Encoder) -> bool:
    """Whether a file's tensor is a source's tensor as `encoder` encodes it."""
    return all(same_bits(left.box(info, part), encoder.encode(info, part, box)) for part, box in _parts(right, other))


def _encoder(reader: Reader, info: TensorInfo, quantization: Quantization, said: Mapping[str, Any]) -> Encoder:
    """Returns the encoder with which an export quantises the source's tensor `info`, after a cast to the dtype of config `said`."""
    named = (vars(torch).get(str(said[key])) for key in assets.DTYPE_KEYS if said.get(key))
    dtype = min((info.dtype, *(dtype for dtype in named if isinstance(dtype, torch.dtype))), key=lambda dtype: dtype.itemsize)
    largest = torch.zeros(BlockFP8(quantization.block).scales_shape(info.shape))
    for part, box in _parts(reader, info):
        raise_to(largest, part, box.to(dtype), quantization.block)
    return Encoder(quantization, {info.name: dtype}, {info.name: largest})


def _parts(reader: Reader, info: TensorInfo) -> Iterator[tuple[Transfer, torch.Tensor]]:
    """Yields the whole tensor in parts, each valid until the next."""
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    for part in reader.parts(info, whole(info.shape)):
        yield part, reader.fetch(info, part, lambda: buffer).box


def _headers(folder: Path, said: Manifest) -> tuple[list[TensorInfo], list[str]]:
    """Returns every tensor in the manifest's files of weights, and a line for each problem with these files."""
    found, problems, names = list[TensorInfo](), list[str](), dict[str, list[str]]()
    for name, entry in said.tensors.items():
        names.setdefault(entry.file, []).append(name)
    for file in sorted(names):
        if not os.path.lexists(folder / file):
            problems.append(f"{file}: the file is missing")
            continue
        try:
            inside(folder, file)
            infos = read_header(folder / file)
        except CheckpointError as error:
            problems.append(f"{file}: {error}")
            continue
        found += infos.values()
        problems += [f"{file}: {name} is missing" for name in names[file] if name not in infos]
    return found, problems


def _other_files(folder: Path, said: Manifest) -> Iterator[str]:
    for name, entry in said.files.items():
        if not os.path.lexists(folder / name):
            yield f"{name}: the file is missing"
            continue
        try:
            if manifest.file_entry(inside(folder, name)) != entry:
                yield f"{name}: the file has other bytes than were written"
        except CheckpointError as error:
            yield f"{name}: {error}"


def _entries(found: Sequence[TensorInfo], said: Manifest) -> Iterator[str]:
    for info in sorted(found, key=lambda info: natural(info.name)):
        entry = said.tensors.get(info.name)
        if entry is None or entry.file != info.file.name:
            yield f"{info.file.name}: {info.name} is not in the manifest{'' if entry is None else f', but in {entry.file}'}"
        elif not _is_same_place(info, said):
            is_ = manifest.entry_of(info, entry.xxh3_128)
            yield (
                f"{is_.file}: {info.name} is {is_.dtype} {is_.shape} at byte {is_.offset}, not {entry.dtype} {entry.shape} at byte "
                f"{entry.offset}"
            )


def _is_same_place(info: TensorInfo, said: Manifest) -> bool:
    entry = said.tensors[info.name]
    return manifest.entry_of(info, entry.xxh3_128) == entry


def _of_all_ranks(names: list[str]) -> list[str]:
    return sorted((name for found in collectives.all_gather(names) for name in found), key=natural)
