"""The safetensors format: headers parsed without trusting them, and headers written.

A file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes (huggingface/safetensors, README). The
library's own reader accepts duplicate keys and wrong sizes; here everything is checked before a byte of a tensor is touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from megabridge.errors import CheckpointError

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER: Final = 100_000_000  # bytes; the limit of the reference implementation


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `start` is the byte offset in the file, not in the payload."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return out


def parse_json(text: bytes, what: str) -> Any:
    """JSON with unique keys and bounded depth. Raises CheckpointError that names `what`."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{what} must be valid JSON: {reason}; fetch the file again.") from None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file. Raises CheckpointError when the header and the file's size don't agree exactly."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER) or length < 2:
            raise CheckpointError(
                f"{file} must begin with a header inside the file and of at most {MAX_HEADER} bytes; the file has {size} bytes and "
                f"says its header has {length}; fetch it again."
            )
        header = parse_json(stream.read(length), f"the header of {file}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} must be a JSON object, not {type(header).__name__}; fetch it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"__metadata__ of {file} must map names to strings; fetch it again.")
    begin = 8 + length
    infos = {name: _entry(file, name, entry, begin) for name, entry in header.items()}
    _check_tiling(file, [(infos[name].start, infos[name].nbytes, name) for name in infos], begin, size)
    return infos


def _entry(file: Path, name: str, entry: Any, begin: int) -> TensorInfo:
    def wrong(rule: str, value: object) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name!r} must have {rule}, not {value!r}; fetch the file again.")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("exactly dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"one of the dtypes {', '.join(DTYPES)}", dtype)
    if not _naturals(shape):
        raise wrong("a shape of sizes from 0", shape)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("two rising data_offsets", offsets)
    expected = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise wrong(f"{expected} bytes for {dtype} {shape}", offsets)
    return TensorInfo(name, file, DTYPES[dtype], tuple(shape), begin + offsets[0])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


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
    """(length prefix and header, file offsets of the tensors) of a file that holds `entries` in this order."""
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
