"""Hugging Face folders: which tensors they hold, boxes read out of them, and boxes written into files being made."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from megabridge.checkpoint.safetensors import TensorInfo, parse_json, read_header
from megabridge.errors import CheckpointError, listed
from megabridge.mapping import Transfer

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
STAGING: Final = 8 << 20  # elements that a walk holds in memory at once, beside the parameters


def view(tensor: torch.Tensor, geometry: tuple[list[int], list[int], int]) -> torch.Tensor:
    """The elements of a box as a strided view of `tensor` (see `Transfer.native_view`)."""
    sizes, strides, offset = geometry
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)


def native_box(tensor: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    """The native side of `transfer`, in the order of the Hugging Face tensor's dimensions."""
    return view(tensor, transfer.native_view(tensor.stride()))


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a Hugging Face folder, in one file or sharded with an index; all headers are checked.

    Raises CheckpointError for a folder without safetensors, and for an index that doesn't match its files exactly.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return read_header(_inside(folder, SINGLE))
    if index.is_file():
        return _indexed(folder, index)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".pt", ".gguf"))
    found = f"it has {', '.join(others)}" if others else "it has no weights at all"
    raise CheckpointError(f"{folder} must hold {SINGLE} or {INDEX}; {found}; convert the weights to safetensors first.")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` directly in `folder`. Links may lead to the blobs of the same hub cache entry, nowhere else."""
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise CheckpointError(
            f"{folder}: the file name {name!r} in {INDEX} must be a plain name inside the folder; fetch it again."
        )
    path = folder / name
    real, roots = path.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(real.parent == root for root in roots):
        raise CheckpointError(f"{path} must lie inside its folder, but leads to {real}; copy the file there.")
    if not path.is_file():
        raise CheckpointError(f"{path} is named in {INDEX} and must exist; fetch it again.")
    return path


def _indexed(folder: Path, index: Path) -> dict[str, TensorInfo]:
    content = parse_json(index.read_bytes(), str(index))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index} must have a weight_map from tensor names to file names; fetch it again.")
    found: dict[str, TensorInfo] = {}
    problems = []
    for file in sorted(set(names.values())):
        for name, info in read_header(_inside(folder, file)).items():
            if names.get(name) != file:
                place = f"puts it in {names[name]}" if name in names else "doesn't list it"
                problems.append(f"{file} holds {name!r}, but the index {place}")
            found[name] = info
    problems += [f"the index puts {name!r} in {file}, which lacks it" for name, file in names.items() if name not in found]
    if problems:
        raise CheckpointError(f"{index} must match its files; fetch the folder again:\n  " + listed(problems))
    return found


class _Files:
    """Files opened when they are first needed, closed where the `with` block ends. Not shared between threads."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._fds: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, file: Path) -> int:
        if file not in self._fds:
            self._fds[file] = os.open(file, self._flags)
        return self._fds[file]


class Reader(_Files):
    """Reads boxes out of safetensors files. Use as a context.

    `bytes_copied` counts what was copied out of the files.
    """

    def __init__(self, infos: Iterable[TensorInfo]) -> None:
        super().__init__(os.O_RDONLY)
        self._sizes = {info.file: info.file.stat().st_size for info in infos}
        self._maps: dict[Path, mmap.mmap] = {}  # unmapped when the last view goes
        self.bytes_copied = 0

    def mapped(self, info: TensorInfo) -> torch.Tensor:
        """The whole tensor as a view of the mapped file; only pages that are used are read. Must not be written."""
        if info.elements == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        self.check(info.file)
        if info.file not in self._maps:
            self._maps[info.file] = mmap.mmap(self._fd(info.file), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(self._maps[info.file], dtype=info.dtype, count=info.elements, offset=info.start).view(info.shape)

    def box(self, info: TensorInfo, transfer: Transfer) -> torch.Tensor:
        """The file's side of `transfer`, as a view of the mapped file."""
        return view(self.mapped(info), transfer.hf_view())

    def read(self, info: TensorInfo, transfer: Transfer, target: torch.Tensor) -> None:
        """Copies the file's side of `transfer` into its native side in `target`, casting to its dtype.

        A box that is one stretch on both sides is read straight into the parameter's memory; any other goes through the mapping,
        from which only what belongs to the box is copied.
        """
        if transfer.elements == 0:
            return
        box = native_box(target, transfer)
        _, starts = transfer.rows()
        if len(starts) == 1 and box.is_contiguous() and box.device.type == "cpu" and box.dtype == info.dtype:
            self._pread(info, starts[0] * info.dtype.itemsize, box)
        else:
            box.copy_(self.box(info, transfer))
        self.bytes_copied += transfer.elements * info.dtype.itemsize

    def _pread(self, info: TensorInfo, offset: int, target: torch.Tensor) -> None:
        done, total = 0, target.numel() * target.element_size()
        buffer = memoryview((ctypes.c_char * total).from_address(target.data_ptr())).cast("B")
        while done < total:
            got = os.preadv(self._fd(info.file), [buffer[done:]], info.start + offset + done)
            if got == 0:
                self.check(info.file)
                raise CheckpointError(f"{info.file} ended inside tensor {info.name!r}; fetch it again.")
            done += got

    def check(self, file: Path) -> None:
        """Raises CheckpointError when the file's size is no longer what it was when reading began."""
        size = os.fstat(self._fd(file)).st_size
        if size != self._sizes[file]:
            raise CheckpointError(
                f"{file} had {self._sizes[file]} bytes and now has {size}: it changed while being read; start again."
            )

    def finish(self) -> None:
        """Checks every file that was read once more."""
        for file in self._fds:
            self.check(file)
