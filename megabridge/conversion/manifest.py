"""The manifest of an exported folder: megabridge.json, which says what every file holds, down to a digest of each tensor.

`tensors` and `files` depend on the model alone: exports under two layouts have them in common. `layout` and `versions` say how
the folder was made.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from megabridge import agreement, regular
from megabridge.checkpoint import assets
from megabridge.checkpoint.hf import INDEX, Reader
from megabridge.checkpoint.safetensors import NAMES, TensorInfo, parse_json
from megabridge.errors import CheckpointError
from megabridge.version import VERSION

MANIFEST: Final = "megabridge.json"
FORMAT: Final = 1
_CHUNK: Final = 8 << 20  # bytes of a file that are read at once


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: `offset` is where its bytes begin in `file`, `dtype` is safetensors' name, `xxh3_128` the digest of its bytes."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file beside the weights: its size in bytes, and its digest."""

    size: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Tensors in the order of the files, other files (config, tokenizer, index) by their path in the folder."""

    tensors: Mapping[str, Entry]
    files: Mapping[str, FileEntry]
    layout: Mapping[str, int]
    versions: Mapping[str, str]


def entry_of(info: TensorInfo, digest: str) -> Entry:
    """What the manifest says of a tensor."""
    return Entry(info.file.name, info.start, NAMES[info.dtype], info.shape, digest)


def share(infos: Iterable[TensorInfo], ranks: Mapping[str, Sequence[int]] | None = None) -> list[TensorInfo]:
    """This rank's share of tensors, about the same number of bytes on every rank; `ranks` says by name who may take one."""
    load = [0] * agreement.world_size()
    mine = []
    for info in infos:
        least = min(range(len(load)) if ranks is None else ranks[info.name], key=lambda rank: load[rank])
        load[least] += info.nbytes
        if least == agreement.rank():
            mine.append(info)
    return mine


def digests(infos: Iterable[TensorInfo]) -> dict[str, str]:
    """The digest of each tensor's bytes as the files hold them, by name. Any rank may call it, for any tensors."""
    wanted = list(infos)
    with Reader(wanted) as reader:
        found = {info.name: digest(reader.mapped(info)) for info in wanted}
        reader.finish()
    return found


def digest(tensor: torch.Tensor) -> str:
    size = tensor.numel() * tensor.element_size()
    return xxhash.xxh3_128_hexdigest((ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b"")


def file_entry(file: Path) -> FileEntry:
    """The size and digest of a file. Raises CheckpointError where it is no regular file."""
    digest = xxhash.xxh3_128()
    with regular.opened(file) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        return FileEntry(stream.tell(), digest.hexdigest())


def write(folder: Path, infos: Mapping[str, TensorInfo], found: Mapping[str, str], layout: Mapping[str, int]) -> None:
    """Writes the manifest of a folder that is complete but for it; `found` has every tensor's digest. One rank calls it."""
    shards = {info.file.name for info in infos.values()}
    content = {
        "format": FORMAT,
        "tensors": {name: asdict(entry_of(info, found[name])) for name, info in infos.items()},
        "files": {name: asdict(file_entry(folder / name)) for name in other_files(folder) if name not in shards},
        "layout": dict(layout),
        "versions": {"megabridge": VERSION, "megatron-core": version("megatron-core"), "torch": torch.__version__},
    }
    lines = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(lines + "\n", encoding="utf-8")


def other_files(folder: Path) -> list[str]:
    """Paths of the files in `folder`, but the manifest's, in order."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != MANIFEST)


def may_hold(name: str) -> bool:
    """Whether an export's folder may hold an entry of this name: weights, their index, the manifest, what belongs to a model."""
    patterns = (
        "*.safetensors",
        INDEX,
        MANIFEST,
        assets.CONFIG,
        assets.ADAPTER,
        *(pattern.partition("/")[0] for pattern in assets.PATTERNS),
    )
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def read(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises CheckpointError where there is none or it isn't one."""
    path = folder / MANIFEST
    if not regular.exists(path):
        raise CheckpointError(f"{folder} must hold {MANIFEST}, which every export of megabridge writes; export the model again.")
    content = parse_json(regular.read(path), str(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(
            f"{path} must be a manifest of format {FORMAT}, not {found!r}; check it with the version that wrote it."
        )
    try:
        _check_paths(content)
        return Manifest(
            tensors={name: Entry(**entry | {"shape": tuple(entry["shape"])}) for name, entry in content["tensors"].items()},
            files={name: FileEntry(**entry) for name, entry in content["files"].items()},
            layout=dict(content["layout"]),
            versions=dict(content["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} must say of every tensor file, offset, dtype, shape and digest ({error!r}); export again."
        ) from None


def _check_paths(content: dict[str, Any]) -> None:
    """Raises ValueError where a file's name leads out of the folder."""
    names = {entry["file"] for entry in content["tensors"].values()}
    for name in (*names, *content["files"]):
        if "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in Path(name).parts or (name in names and "/" in name):
            raise ValueError(f"the file name {name!r}")
