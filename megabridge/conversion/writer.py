"""Sharded safetensors files: planned from names and shapes alone, reserved first, then filled by all ranks at once.

Names and contents don't depend on the layout of the ranks: two exports of one model are the same files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megabridge.checkpoint.hf import INDEX, SINGLE
from megabridge.checkpoint.safetensors import TensorInfo, build_header
from megabridge.conversion.plan import Spec
from megabridge.errors import CheckpointError, ConfigError

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One file: its header, its whole size in bytes, and where its tensors lie."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]


def parse_size(text: str | int) -> int:
    """Bytes in "5GB", "200MiB" or a number. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(text).strip().upper())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"max_shard_size={text!r} must be a number of bytes such as '5GB' or '200MiB'.")
    return int(float(found[1]) * _UNITS[found[2]])


def plan_shards(folder: Path, specs: Mapping[str, Spec], max_shard_size: str | int = "5GB") -> list[Shard]:
    """Files in `folder` for tensors in the given order: a new file starts when the next tensor would not fit."""
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
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [_shard(folder, file, {name: specs[name] for name in names}) for file, names in zip(files, groups, strict=True)]


def _shard(folder: Path, file: str, specs: Mapping[str, Spec]) -> Shard:
    header, offsets = build_header([(name, spec.dtype, spec.shape) for name, spec in specs.items()])
    infos = {
        name: TensorInfo(name, folder / file, spec.dtype, spec.shape, offset)
        for (name, spec), offset in zip(specs.items(), offsets, strict=True)
    }
    return Shard(file, header, len(header) + sum(info.nbytes for info in infos.values()), infos)


def reserve(folder: Path, shards: list[Shard]) -> None:
    """Makes the folder and its files at their final size, headers written. One rank calls it.

    Raises CheckpointError that names the bytes needed and free when they don't fit.
    """
    needed = sum(shard.size for shard in shards)
    try:
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise CheckpointError(
                f"the export needs {needed} bytes, but {folder.parent} has {free} free; free some or export elsewhere."
            )
        folder.mkdir()
        for shard in shards:
            with (folder / shard.name).open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, shard.size)
                stream.write(shard.header)
    except OSError as error:
        raise CheckpointError(
            f"the export needs {needed} bytes in {folder.parent}: {error.strerror}; free some or export elsewhere."
        ) from error


def write_index(folder: Path, shards: list[Shard]) -> None:
    """The index of a sharded folder; nothing for a single file. One rank calls it."""
    if len(shards) == 1:
        return
    names = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
