"""megatron-core's indexed data: the tokens of all documents in PREFIX.bin, their places in PREFIX.idx.

The format is that of megatron/core/datasets/indexed_dataset.py (0.19), read and written here without importing megatron:
megabridge.data must not depend on it, and processes that only write tokens should start fast. A document consists of sequences;
today's writers write one for each.

    .idx: "MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), sequences (u64), document bounds (u64), then per sequence its tokens
          (i32) and its byte offset in .bin (i64), then the bounds: numbers of sequences (i64), from 0
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megabridge.errors import ConfigError
from megabridge.storage import crash_notes, data_files, regular_files

_MAGIC: Final = b"MMIDIDX\x00\x00"
_HEAD: Final = struct.Struct("<9sQBQQ")
_DTYPES: Final[dict[int, type[np.generic]]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Returns the dtype that tokens are stored in: megatron-core's DType.optimal_dtype."""
    return np.uint16 if vocab_size < 65500 else np.int32


class Indexed:
    """The documents of one prefix, mapped into memory. Raises ConfigError for missing or damaged files."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._bin, index = data_files.check_indexed(prefix)
        dtype, self._lengths, self._offsets, self._bounds = _read_index(index)
        self._dtype = np.dtype(dtype)
        self._check(index)
        # An empty file can't be mapped.
        size = self._bin.stat().st_size
        crash_notes.note_mapping(self._bin, size)
        self._bytes: NDArray[np.uint8] = np.memmap(self._bin, np.uint8, "r") if size else np.zeros(0, np.uint8)
        totals = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        self.lengths: NDArray[np.int64] = np.diff(totals[self._bounds])
        """Number of tokens of each document."""

    def __len__(self) -> int:
        return len(self.lengths)

    def _check(self, index: Path) -> None:
        size, bounds = self._bin.stat().st_size, self._bounds
        ends = self._offsets + self._lengths.astype(np.int64) * self._dtype.itemsize
        problems = [
            (len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(self._lengths), "its documents don't cover its sequences"),
            (bool((np.diff(bounds) < 0).any()), "the bounds of its documents decrease"),
            (bool((self._lengths < 0).any() or (self._offsets < 0).any()), "a length or an offset is negative"),
            (bool((self._offsets % self._dtype.itemsize).any()), "an offset is not a whole number of tokens"),
            (bool((ends > size).any()), f"it points past the end of {self._bin}, {size} bytes"),
        ]
        for is_wrong, what in problems:
            if is_wrong:
                raise ConfigError(f"{index}: {what}; the file is damaged or cut off, make it again.")

    def tokens(self, document: int, begin: int = 0, end: int | None = None) -> NDArray[np.int64]:
        """Returns the tokens `begin` to `end` of a document."""
        first, last = int(self._bounds[document]), int(self._bounds[document + 1])
        parts = [self._sequence(number) for number in range(first, last)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, self._dtype)
        return whole[begin:end].astype(np.int64)

    def _sequence(self, number: int) -> NDArray[Any]:
        begin = int(self._offsets[number])
        return self._bytes[begin : begin + int(self._lengths[number]) * self._dtype.itemsize].view(self._dtype)


def _read_index(file: Path) -> tuple[type[np.generic], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    size = file.stat().st_size
    with regular_files.opened(file) as stream:
        head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise ConfigError(f"{file} is not a megatron-core index; name the prefix of a pair of .bin and .idx.")
    _, version, code, sequences, bounds = _HEAD.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise ConfigError(f"{file}: version {version} with dtype code {code} must be version 1 with integers; make it again.")
    wanted = _HEAD.size + sequences * 12 + bounds * 8
    if size < wanted:
        raise ConfigError(f"{file} has {size} bytes but should have {wanted}; it is cut off, make it again.")
    crash_notes.note_mapping(file, size)
    content = np.memmap(file, np.uint8, "r")
    place = _HEAD.size
    found: list[NDArray[Any]] = []
    for count, dtype in ((sequences, np.int32), (sequences, np.int64), (bounds, np.int64)):
        end = place + count * np.dtype(dtype).itemsize
        found.append(content[place:end].view(dtype))
        place = end
    return _DTYPES[code], found[0], found[1], found[2]


def write_index(file: Path, lengths: Sequence[int] | NDArray[np.int64], dtype: type[np.generic]) -> None:
    """Writes .idx for documents of `lengths` tokens that follow each other in .bin."""
    counts = np.asarray(lengths, np.int64)
    if len(counts) and counts.max() > np.iinfo(np.int32).max:
        raise ConfigError(f"a document has {counts.max()} tokens, more than {file} can hold; split it.")
    code = next(code for code, known in _DTYPES.items() if known is dtype)
    ends = np.cumsum(counts) * np.dtype(dtype).itemsize
    with file.open("wb") as stream:
        stream.write(_HEAD.pack(_MAGIC, 1, code, len(counts), len(counts) + 1))
        stream.write(counts.astype("<i4").tobytes())
        stream.write(np.concatenate([[0], ends[:-1]]).astype("<i8").tobytes() if len(counts) else b"")
        stream.write(np.arange(len(counts) + 1, dtype="<i8").tobytes())


def write(prefix: str | Path, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Writes both files for documents in memory."""
    dtype, (content, index) = token_dtype(vocab_size), data_files.indexed_files(prefix)
    lengths = []
    with content.open("wb") as stream:
        for document in documents:
            stream.write(np.asarray(document, dtype).tobytes())
            lengths.append(len(document))
    write_index(index, lengths, dtype)
