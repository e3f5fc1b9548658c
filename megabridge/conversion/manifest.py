"""The manifest of an exported folder: megabridge.json, which lists the content of every file with a digest of each tensor.

`tensors` and `files` depend on the model alone and are equal in exports under two layouts. `layout` and `versions` record how the
folder was made.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final, Self

import torch
import xxhash

from megabridge.errors import CheckpointError, ConfigError
from megabridge.hf import assets
from megabridge.hf.safetensors_format import NAMES, TensorInfo, parse_json
from megabridge.hf.tensor_files import INDEX, SINGLE, Reader
from megabridge.parallel import collectives
from megabridge.parallel.topology import Topology
from megabridge.storage import regular_files
from megabridge.storage.inside_folder import entries, inside
from megabridge.version import VERSION

MANIFEST: Final = "megabridge.json"
FORMAT: Final = 1
_CHUNK: Final = 8 << 20  # bytes of a file that are read at once
_TEXTS: Final = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt")
_HARMLESS: Final = (*_TEXTS, ".gitattributes", ".gitignore", ".git")  # a worktree's .git is a file
APART: Final = (".git", ".cache/huggingface")  # of git, and of a download from the hub


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: `offset` is where its bytes begin in `file`, `dtype` is safetensors' name, `xxh3_128` the digest of its bytes."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file other than the weights: its size in bytes, and its digest."""

    size: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest: tensors in the order of the files, other files (config, tokenizer, index) by their path in the folder."""

    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    layout: Topology
    versions: Mapping[str, str]

    def paths(self) -> set[str]:
        """Returns the paths of all files, weights included."""
        return {*self.files, *(entry.file for entry in self.tensors.values())}

    def only(self, paths: Collection[str]) -> Self:
        """Returns the manifest restricted to the files `paths`."""
        tensors = {name: entry for name, entry in self.tensors.items() if entry.file in paths}
        return replace(self, tensors=tensors, files={path: entry for path, entry in self.files.items() if path in paths})


def entry_of(info: TensorInfo, digest: str) -> TensorEntry:
    """Returns the manifest's entry for a tensor."""
    return TensorEntry(info.file.name, info.start, NAMES[info.dtype], info.shape, digest)


def share(infos: Iterable[TensorInfo], ranks: Mapping[str, Sequence[int]] | None = None) -> list[TensorInfo]:
    """Returns this rank's share of tensors, about equal in bytes on every rank; `ranks` lists by name who may take a tensor."""
    load = [0] * collectives.world_size()
    mine = []
    for info in infos:
        least = min(range(len(load)) if ranks is None else ranks[info.name], key=lambda rank: load[rank])
        load[least] += info.nbytes
        if least == collectives.rank():
            mine.append(info)
    return mine


def digests(infos: Iterable[TensorInfo]) -> dict[str, str]:
    """Returns by name the digest of each tensor's bytes in its file. Any rank may call it, for any tensors."""
    wanted = list(infos)
    with Reader(wanted) as reader:
        found = {info.name: digest(reader.mapped(info)) for info in wanted}
        reader.finish()
    return found


def digest(tensor: torch.Tensor) -> str:
    size = tensor.numel() * tensor.element_size()
    return xxhash.xxh3_128_hexdigest((ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b"")


def file_entry(file: Path) -> FileEntry:
    """Returns the size and digest of a file. Raises CheckpointError where it isn't a regular file."""
    digest = xxhash.xxh3_128()
    with regular_files.opened(file) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        return FileEntry(stream.tell(), digest.hexdigest())


def write(folder: Path, infos: Mapping[str, TensorInfo], found: Mapping[str, str], layout: Topology | None) -> None:
    """Writes the manifest of an otherwise complete folder; `found` has every tensor's digest.

    `layout` is None for tensors that belong to no layout. One rank calls it. Raises CheckpointError for files whose
    names differ by case alone.
    """
    shards = {info.file.name for info in infos.values()}
    others = [name for name in other_files(folder) if name not in shards]
    try:
        _check_paths(shards, others)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} can't have {error}, which some file systems can't tell apart; rename one at the source."
        ) from None
    content = {
        "format": FORMAT,
        "tensors": {name: asdict(entry_of(info, found[name])) for name, info in infos.items()},
        "files": {name: asdict(file_entry(folder / name)) for name in others},
        "layout": {} if layout is None else layout.sizes(),
        "versions": {"megabridge": VERSION, "megatron-core": version("megatron-core"), "torch": torch.__version__},
    }
    lines = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(lines + "\n", encoding="utf-8")


def other_files(folder: Path) -> list[str]:
    """Returns the sorted paths of the files in `folder`, except the manifest."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != MANIFEST)


def is_written(path: str) -> bool:
    """Whether an export may write a file of this path in its folder: weights, their index, config, tokenizer, code, adapters."""
    weights = (SINGLE, "model-*-of-*.safetensors", INDEX, assets.ADAPTER_WEIGHTS)
    patterns = (*weights, MANIFEST, assets.CONFIG, assets.ADAPTER, *assets.PATTERNS, *assets.CODE)
    return any(assets.matches(path, pattern) for pattern in patterns)


def is_harmless(path: str, state: os.stat_result) -> bool:
    """Whether an entry of an export's folder can't change what is loaded from it: a model card, a licence, files of git."""
    return (stat.S_ISREG(state.st_mode) and path in _HARMLESS) or (stat.S_ISDIR(state.st_mode) and path in APART)


def unlisted(folder: Path, listed: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns a line for each entry of `folder` that is neither in `listed` nor harmless, and the paths of the harmless ones.

    Raises CheckpointError where the folder can't be read.
    """
    problems, harmless = [], []
    for path, state in sorted(entries(folder, apart=APART)):
        if is_harmless(path, state):
            harmless.append(path)
        elif path not in listed:
            problems.append(f"{path}: the {regular_files.kind(state.st_mode).removeprefix('a ')} is not in the manifest")
    return problems, harmless


def read(folder: Path) -> Manifest:
    """Reads the manifest of `folder`. Raises CheckpointError where it is missing or damaged."""
    path = folder / MANIFEST
    if not regular_files.exists(path):
        raise CheckpointError(f"{folder} must hold {MANIFEST}, which every export of megabridge writes; export the model again.")
    content = parse_json(regular_files.read(inside(folder, MANIFEST)), str(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(
            f"{path} must be a manifest of format {FORMAT}, not {found!r}; check it with the version that wrote it."
        )
    try:
        _check_paths({entry["file"] for entry in content["tensors"].values()}, content["files"].keys())
        return Manifest(
            tensors={name: TensorEntry(**entry | {"shape": tuple(entry["shape"])}) for name, entry in content["tensors"].items()},
            files={name: FileEntry(**entry) for name, entry in content["files"].items()},
            layout=Topology.of_sizes(content["layout"]),
            versions=dict(content["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} must give file, offset, dtype, shape and digest of every tensor ({error!r}); export again."
        ) from None


def _check_paths(shards: Collection[str], others: Collection[str]) -> None:
    """Raises ValueError for a file name that leads out of the folder, isn't a plain path, or equals another but for case."""
    seen: dict[str, str] = {}
    for name in (*shards, *others):
        parts = name.split("/")
        is_plain = all(part not in ("", ".", "..") for part in parts) and not set(name) & {"\0", "\\"}
        if not is_plain or (name in shards and len(parts) > 1) or name == MANIFEST:
            raise ValueError(f"the file name {name!r}")
        if (other := seen.setdefault(name.casefold(), name)) != name or (name in shards and name in others):
            raise ValueError(f"the file names {other!r} and {name!r}")
