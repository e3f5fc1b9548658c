"""Shards: which safetensors file holds which tensor, and at which offset. Planned from names and shapes alone.

By default an export has the same files as its source (`SourceRecord.files_of`); otherwise files are filled up to a size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megabridge.conversion.plan import TensorSpec
from megabridge.errors import ConfigError
from megabridge.hf.safetensors_format import TensorInfo, build_header
from megabridge.hf.tensor_files import SINGLE

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One file: its header, its whole size in bytes, and the places of its tensors."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]


def parse_size(text: str | int | None) -> int:
    """Returns the bytes in "5GB", "200MiB" or a number; None is 5GB. Raises ConfigError for anything else."""
    text = "5GB" if text is None else text
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(text).strip().upper())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"max_shard_size={text!r} must be a number of bytes such as '5GB' or '200MiB'.")
    return int(float(found[1]) * _UNITS[found[2]])


def plan_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    max_shard_size: str | int | None = None,
    *,
    only: str | None = None,
    files: Mapping[str, Sequence[str]] | None = None,
) -> list[Shard]:
    """Plans files in `folder` for tensors in the given order: a new file starts when the next tensor would not fit.

    `only` names a single file for all tensors, whatever its size. `files` lists the tensors of each file, in order; it overrides
    the other two.
    """
    if files:
        return [_shard(folder, file, {name: specs[name] for name in names}) for file, names in files.items()]
    if only is not None:
        return [_shard(folder, only, specs)]
    limit = parse_size(max_shard_size)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = TensorInfo(name, folder, spec.dtype, spec.shape, 0).nbytes
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [_shard(folder, file, {name: specs[name] for name in group}) for file, group in zip(names, groups, strict=True)]


def _shard(folder: Path, file: str, specs: Mapping[str, TensorSpec]) -> Shard:
    header, offsets = build_header([(name, spec.dtype, spec.shape) for name, spec in specs.items()])
    infos = {
        name: TensorInfo(name, folder / file, spec.dtype, spec.shape, offset)
        for (name, spec), offset in zip(specs.items(), offsets, strict=True)
    }
    return Shard(file, header, len(header) + sum(info.nbytes for info in infos.values()), infos)
