"""The safetensors format: parses and validates untrusted headers, and writes headers.

A file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes (huggingface/safetensors, README). The
library's own reader accepts duplicate keys and wrong sizes; here everything is checked before a byte of a tensor is read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from megabridge.errors import CheckpointError
from megabridge.storage import regular_files

if TYPE_CHECKING:
    from megabridge.hf.quantised_weights import Encoding

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER: Final = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMENSIONS: Final = 64  # what torch can hold; a product of a million sizes would take minutes
MAX_SIZE: Final = 2**63 - 1  # of a dimension or an offset

Stamp = tuple[int, int, int]  # identifies a state of a file: inode, size in bytes, time of change in ns


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: `start` is the byte offset in the file, not in the payload.

    `stamp` is the file's when its header was read, or None for a file that is being written. `encoding` are the two stored tensors
    of a quantised tensor; then `dtype` and `shape` are those of the decoded tensor, `start` that of its packed numbers.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stamp: Stamp | None = field(default=None, compare=False, repr=False)
    encoding: Encoding | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:500]!r} appears twice")
    return out


def parse_json(text: bytes, what: str) -> Any:
    """Parses JSON with unique keys and bounded depth. Raises CheckpointError that names `what`."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{what} must be valid JSON: {reason}; fetch the file again.") from None


def stamp_of(file: Path | int) -> Stamp:
    """Returns the stamp of a path or an open descriptor."""
    status = os.stat(file)  # noqa: PTH116  a descriptor has no path
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads the tensors in the header of a safetensors file. Raises CheckpointError if header and file size don't agree exactly."""
    with regular_files.opened(file) as stream:
        stamp = stamp_of(stream.fileno())
        prefix = stream.read(8)
        return parse_header(file, prefix, stream.read(header_length(file, prefix, stamp[1])), stamp)


def header_length(file: Path, prefix: bytes, size: int) -> int:
    """Returns the header's length in a file of `size` bytes that begins with `prefix` (8 bytes). Raises CheckpointError."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER) or length < 2:
        raise CheckpointError(
            f"{file} must begin with a header inside the file and of at most {MAX_HEADER} bytes; the file has {size} bytes and "
            f"says its header has {length}; fetch it again."
        )
    return length


def parse_header(file: Path, prefix: bytes, text: bytes, stamp: Stamp) -> dict[str, TensorInfo]:
    """Parses the tensors in the header `text`, without reading. Raises CheckpointError as `read_header` does."""
    begin = 8 + header_length(file, prefix, stamp[1])
    header = parse_json(text, f"the header of {file}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} must be a JSON object, not {type(header).__name__}; fetch it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"__metadata__ of {file} must map names to strings; fetch it again.")
    infos = {name: _entry(file, name, entry, begin, stamp) for name, entry in header.items()}
    _check_tiling(file, [(infos[name].start, infos[name].nbytes, name) for name in infos], begin, stamp[1])
    return infos


def _entry(file: Path, name: str, entry: Any, begin: int, stamp: Stamp) -> TensorInfo:
    def wrong(rule: str, value: object) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        return CheckpointError(f"{file}: tensor {name[:500]!r} must have {rule}, not {shown}; fetch the file again.")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("exactly dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"one of the dtypes {', '.join(DTYPES)}", dtype)
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise wrong(f"a shape of at most {MAX_DIMENSIONS} sizes from 0", shape)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("two rising data_offsets", offsets)
    expected = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise wrong(f"{expected} bytes for {dtype} {shape}", offsets)
    return TensorInfo(name, file, DTYPES[dtype], tuple(shape), begin + offsets[0], stamp)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_SIZE for item in value)


def _check_tiling(file: Path, spans: list[tuple[int, int, str]], begin: int, size: int) -> None:
    position = begin
    for start, nbytes, name in sorted(spans):
        if start != position:
            raise CheckpointError(
                f"{file}: tensor {name!r} must begin at byte {position}, the end of the one before, not at {start}; fetch it again."
            )
        position = start + nbytes
    if position != size:
        raise CheckpointError(
            f"{file} must have {position} bytes by its header, but has {size}: it is truncated or longer; fetch it again."
        )


def build_header(entries: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """Returns (length prefix and header, file offsets of the tensors) for a file with `entries` in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, offsets = 0, []
    for name, dtype, shape in entries:
        end = position + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        offsets.append(position)
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [begin + offset for offset in offsets]
