"""Writes sharded safetensors files: planned from names and shapes alone, reserved first, then filled by all ranks at once.

Names and contents don't depend on the layout of the ranks: two exports of one model are the same files. Files left by a killed
export are reused: one with the right size and header is kept, and only those of its boxes that differ are written.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import override

import torch

from megabridge.conversion.compare import is_finite, same_bits
from megabridge.conversion.shards import Shard
from megabridge.errors import CheckpointError
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import INDEX, STAGING, Files, Reader, native_box
from megabridge.mapping import Transfer, coalesced
from megabridge.storage import folders

Encode = Callable[[TensorInfo, Transfer, torch.Tensor], torch.Tensor]
"""Maps (a tensor of a file, a part of it, that part of a parameter) to the part as the file holds it, in the file's dtype."""


def reserve(folder: Path, shards: list[Shard]) -> frozenset[Path]:
    """Creates the folder and its files at their final size, with headers. One rank calls it.

    Existing files of the same size and header are kept and returned; everything else in the folder is removed. Raises
    CheckpointError with the bytes needed and free when they don't fit.
    """
    with space_named(folder, shards):
        folders.make_parents(folder)
        folder.mkdir(exist_ok=True)
        kept = frozenset(folder / shard.name for shard in shards if _is_same(folder / shard.name, shard))
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry not in kept:
                entry.unlink()
        needed = sum(shard.size for shard in shards if folder / shard.name not in kept)
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for shard in shards:
            if folder / shard.name not in kept:
                with (folder / shard.name).open("xb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, shard.size)
                    stream.write(shard.header)
        return kept


def _is_same(file: Path, shard: Shard) -> bool:
    """Whether a file has a shard's size and header. The header is written after the space was reserved, so it proves that too."""
    if file.is_symlink() or not file.is_file() or file.stat().st_size != shard.size:
        return False
    with file.open("rb") as stream:
        return stream.read(len(shard.header)) == shard.header


@contextmanager
def space_named(folder: Path, shards: list[Shard]) -> Iterator[None]:
    """Turns an OSError in the block into a CheckpointError that says what failed, and the bytes needed and free."""
    try:
        yield
    except OSError as error:
        needed = sum(shard.size for shard in shards)
        raise CheckpointError(
            f"writing the export failed: {error.strerror} ({error.filename or 'in a shard'}); {folders.space(folder, needed)}; "
            "nothing was published. Free some or export elsewhere."
        ) from error


def cast(info: TensorInfo, part: Transfer, ours: torch.Tensor) -> torch.Tensor:
    """Casts `ours` to the file's dtype."""
    return ours.to(info.dtype)


class Writer(Files):
    """Writes boxes in place into files that exist and have their final size. Use as a context manager.

    In the files of `existing` a box is written only where it differs. `bytes_written` and `bytes_kept` count both cases;
    `nonfinite` maps tensors with NaN or infinite values to a description.

    A box of columns is written with one call per row. Copying it into a shared mapping took a third of the time, but no less once
    the fsync was counted, and a mapping is written back in whole pages, into which ranks on other hosts write too.
    """

    def __init__(self, existing: Sequence[TensorInfo] = (), encode: Encode = cast) -> None:
        super().__init__(os.O_WRONLY)
        self._encode = encode
        self.bytes_written = 0
        self.bytes_kept = 0
        self.nonfinite: dict[str, str] = {}
        self._kept = {info.file for info in existing}
        self._reader = Reader(existing)

    @override
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._reader.__exit__(kind, error, trace)

    def write(self, info: TensorInfo, group: Sequence[Transfer], source: torch.Tensor) -> None:
        """Encodes the native sides of a group from `coalescible` in `source`, and writes them to their box of the file."""
        for parts in zip(*(transfer.split(STAGING // len(group)) for transfer in group), strict=True):
            part = coalesced(parts)
            boxes = [native_box(source, one) for one in parts]
            ours = boxes[0] if len(boxes) == 1 else torch.stack(boxes, -2)  # between the index of a block and its elements
            data = self._encode(info, part, ours).cpu().contiguous()
            if not is_finite(data):
                self.nonfinite[info.name] = (
                    f"finite, but too large for {info.dtype}" if is_finite(ours) else "NaN or infinite values"
                )
            size = data.numel() * info.dtype.itemsize
            fd = self._fd(info.file)  # also for a file that is right already: it may not be durable yet
            if info.file in self._kept and same_bits(data.view(part.hf_view()[0]), self._reader.box(info, part)):
                self.bytes_kept += size
            else:
                self._write(fd, info, part, data)
                self.bytes_written += size

    def _write(self, fd: int, info: TensorInfo, part: Transfer, data: torch.Tensor) -> None:
        itemsize = info.dtype.itemsize
        length, starts = part.contiguous_runs()
        flat = memoryview((ctypes.c_char * (data.numel() * itemsize)).from_address(data.data_ptr())).cast("B")
        step = length * itemsize
        try:
            for number, start in enumerate(starts):
                _pwrite(fd, flat[number * step : (number + 1) * step], info.start + start * itemsize)
        except OSError as error:
            error.filename = error.filename or str(info.file)
            raise

    def sync(self) -> None:
        """Syncs the files that were written to disk."""
        for file, fd in self._fds.items():
            try:
                os.fsync(fd)
            except OSError as error:
                error.filename = str(file)
                raise


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Writes the index of a sharded folder; nothing for a single file. One rank calls it."""
    if len(shards) == 1 and "-of-" not in shards[0].name:
        return
    names = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
