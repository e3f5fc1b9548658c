"""Digests (xxh3_128) of a native checkpoint: of every box in its files, of the metadata with their positions, of its assets.

A box's digest covers its content: dtype, shape and elements, or an object's bytes. It is computed from the memory that is written,
and again from the memory that was read (reader.py), before anything is copied: no extra reads, and disk errors are seen.
The digest of `.metadata` binds a record to one save; a file of another checkpoint with equal sizes has other digests.
"""

from __future__ import annotations

import ctypes
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
import xxhash

from megabridge.errors import CheckpointError
from megabridge.hf.safetensors_format import TensorInfo, parse_json, stamp_of
from megabridge.parallel.collectives import distribute
from megabridge.storage import regular_files
from megabridge.storage.folders import MARKER

FILE: Final = "megabridge_digests.json"
FORMAT: Final = 1
METADATA: Final = ".metadata"
_APART: Final = (".distcp", ".safetensors")  # they have digests by box and by tensor instead
_CHUNK: Final = 8 << 20  # bytes of a file that are read at once
_PIECE: Final = 64 << 20  # bytes of a tensor that one rank reads

Boxes = Mapping[str, Mapping[int, str]]
"""Digests by file and by a box's offset in it."""


@dataclass(frozen=True)
class Digests:
    """The record of a save: `save` is its unique id, `boxes` and `files` are digests, files by path in the folder."""

    save: str
    boxes: Boxes
    files: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Writes it into `folder`. One rank calls it."""
        boxes = {file: {str(begin): digest for begin, digest in found.items()} for file, found in self.boxes.items()}
        content = {"format": FORMAT, "save": self.save, "files": dict(self.files), "boxes": boxes}
        text = json.dumps(content | {"xxh3_128": _own(content)}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="ascii")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads the record in `folder`, None where it has none. Raises CheckpointError for a damaged one."""
        path = folder / FILE
        if not path.is_file():
            return None
        content = parse_json(regular_files.read(path), str(path))
        try:
            own = content.pop("xxh3_128")
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            boxes = {file: {int(begin): digest for begin, digest in found.items()} for file, found in content["boxes"].items()}
            made = cls(str(content["save"]), boxes, dict(content["files"]))
            if own != _own(content):
                raise ValueError("its own digest is another")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} must be the digests that this version of megabridge writes (format {FORMAT}), but is damaged ({error}); "
                "use another step."
            ) from None
        return made

    def check_metadata(self, folder: Path, content: bytes) -> None:
        """Raises CheckpointError unless `content`, that of `.metadata`, has its digest in this record."""
        if self.files.get(METADATA) != of_bytes(content):
            raise CheckpointError(
                f"{folder / METADATA} must belong to the same save as {FILE} beside it, but one of them is damaged or of another "
                "checkpoint; use another step."
            )

    def check_marker(self, folder: Path) -> None:
        """Raises CheckpointError unless megatron-core's own description of the folder is as it was written."""
        if MARKER in self.files and self.files[MARKER] != of_file(folder / MARKER):
            raise CheckpointError(f"{folder / MARKER} has other bytes than were written; use another step.")

    def problems(self, folder: Path, below: str) -> list[str]:
        """Reads the files in `folder`/`below`; returns a line for each that is not as it was written."""
        found = {str(path.relative_to(folder)): path for path in _files(folder / below) if not path.name.startswith(".")}
        written = {name: digest for name, digest in self.files.items() if name.startswith(f"{below}/")}
        return [
            *(f"{name} is missing" for name in sorted(written.keys() - found.keys())),
            *(f"{name} was not written with it" for name in sorted(found.keys() - written.keys())),
            *(f"{name} has other bytes than were written" for name in sorted(found.keys() & written.keys())
              if of_file(found[name]) != written[name]),
        ]  # fmt: skip


def of_folder(folder: Path) -> dict[str, str]:
    """Digests of a native folder's files by path, without those that have digests by box or tensor."""
    return {str(path.relative_to(folder)): of_file(path) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _APART)


def of_box(value: torch.Tensor | io.BytesIO) -> str:
    """Digest of a box: a tensor on the CPU, or an object's bytes."""
    if isinstance(value, io.BytesIO):
        return of_bytes(value.getbuffer())
    digest = xxhash.xxh3_128(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(_memory(whole := value.detach().contiguous()))
    del whole  # not earlier: its memory is read until here
    return digest.hexdigest()


def of_bytes(content: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def of_tensors(infos: Iterable[TensorInfo]) -> str:
    """Digest of the tensors in files: names, dtypes, shapes and elements, however they are distributed over files. Collective.

    Every rank reads its part. `infos` are stored tensors. Raises CheckpointError if a file has changed since its header was read.
    """
    ordered = sorted(infos, key=lambda info: (info.file.name, info.start, info.name))
    pieces = [(info, begin) for info in ordered for begin in range(0, max(info.nbytes, 1), _PIECE)]
    found = distribute("reading the weights' digests", len(pieces), lambda number: _of_piece(*pieces[number]))
    lines = [f"{info.name} {info.dtype} {info.shape} {begin} {digest}" for (info, begin), digest in zip(pieces, found, strict=True)]
    return of_bytes("\n".join(sorted(lines)).encode())


def _of_piece(info: TensorInfo, begin: int) -> str:
    digest, left = xxhash.xxh3_128(), min(_PIECE, info.nbytes - begin)
    with regular_files.opened(info.file) as stream:
        stream.seek(info.start + begin)
        while left and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        if left or (info.stamp is not None and stamp_of(stream.fileno()) != info.stamp):
            raise CheckpointError(f"{info.file} is not the file that it was: it changed while being read; start again.")
    return digest.hexdigest()


def of_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with regular_files.opened(file) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _own(content: Mapping[str, Any]) -> str:
    """Digest of the record itself."""
    return of_bytes(json.dumps(content, sort_keys=True).encode())


def _memory(tensor: torch.Tensor) -> Any:
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
