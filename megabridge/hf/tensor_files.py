"""Weight files of Hugging Face folders: finds their tensors, and reads boxes of them."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, get_args, override

import torch

from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.hf.codecs import sizes_of
from megabridge.hf.contiguous_runs import contiguous_runs, hf_length, narrow, span_of
from megabridge.hf.pickled_weights import read_pickle
from megabridge.hf.safetensors_format import Stamp, TensorInfo, parse_json, read_header, stamp_of
from megabridge.mapping import Transfer
from megabridge.mapping.transfer import contiguous_strides
from megabridge.storage import crash_notes, regular_files
from megabridge.storage.file_systems import is_remote
from megabridge.storage.inside_folder import inside

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
BIN: Final = "pytorch_model.bin"
STAGING: Final = 8 << 20  # elements that a conversion holds in memory at once, besides the parameters
PIECE: Final = 8 << 20  # bytes that one thread reads at once, and the size of its buffer
LONG: Final = 32 << 10  # bytes of a run from which a positioned read is faster than copying out of a mapping
DECODED: Final = 256 << 10  # elements of a quantised tensor that one thread decodes at once
PAGE: Final = 4096  # bytes that a file system fetches at least
_IOV_MAX: Final = 1024  # buffers that one preadv may have (limits.h)

Geometry = tuple[list[int], list[int], int]  # sizes, strides, offset, in elements
Way = Literal["auto", "mapped", "sequential"]
Headers = Callable[[Path], dict[str, TensorInfo]]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Elements of a file in CPU memory: a box of the 1-D tensor `flat`. `is_buffered`: `flat` is in the caller's buffer."""

    flat: torch.Tensor
    geometry: Geometry
    is_buffered: bool

    @property
    def box(self) -> torch.Tensor:
        return view(self.flat, self.geometry)


def view(tensor: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Returns the elements of a box as a strided view of `tensor` (see `Transfer.native_view`)."""
    sizes, strides, offset = geometry
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)


def native_box(tensor: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    """Returns the native side of `transfer` as a view, in the order of the Hugging Face tensor's dimensions."""
    return view(tensor, transfer.native_view(tensor.stride()))


def find_tensors(folder: Path, *, allow_bin: bool = False) -> dict[str, TensorInfo]:
    """Finds every tensor of a Hugging Face folder, in one file or sharded with an index; all headers are checked.

    Safetensors are preferred; torch's pickled files are read only with `allow_bin`, and then only tensors are unpickled. Raises
    CheckpointError for a folder without weights, and for an index that doesn't match its files exactly.
    """
    kinds: list[tuple[str, str, Headers]] = [(SINGLE, INDEX, read_header), (BIN, f"{BIN}.index.json", read_pickle)]
    for single, index, read in kinds[: 2 if allow_bin else 1]:
        if (folder / single).is_file():
            return read(_inside(folder, single, index))
        if (folder / index).is_file():
            return _indexed(folder, index, read)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".pt", ".gguf"))
    found = f"it has {', '.join(others[:8])}" if others else "it has no weights at all"
    pickled = any(name.startswith("pytorch_model") for name in others)
    allow = "set conversion.allow_bin=true to read pickled tensors (no code is run), or " if pickled else ""
    raise CheckpointError(f"{folder} must hold {SINGLE} or {INDEX}; {found}; {allow}convert the weights to safetensors first.")


def _inside(folder: Path, name: str, index: str) -> Path:
    """The file `name` directly in `folder`, which must not be a link that leads out of it (see `inside`)."""
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise CheckpointError(
            f"{folder}: the file name {name[:500]!r} in {index} must be a plain name inside the folder; fetch it again."
        )
    inside(folder, name)
    return folder / name


def parse_index(text: bytes, index: Path) -> dict[str, str]:
    """Parses the weight_map of an index: file names by tensor name. Raises CheckpointError; reads no files."""
    content = parse_json(text, str(index))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index} must have a weight_map from tensor names to file names; fetch it again.")
    return names


def _indexed(folder: Path, index: str, read: Headers) -> dict[str, TensorInfo]:
    path = folder / index
    names = parse_index(regular_files.read(path), path)
    files = sorted(set(names.values()))
    stem, suffix = index.removesuffix(".index.json").rsplit(".", 1)
    strays = sorted(stray.name for stray in folder.glob(f"{stem}-*-of-*.{suffix}") if stray.name not in files)
    problems = [
        f"{stray} lies in the folder, but the index doesn't name it; remove it if it is of another model" for stray in strays
    ]
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read(_inside(folder, file, index)).items():
            if names.get(name) != file:
                place = f"puts it in {names[name]}" if name in names else "doesn't list it"
                problems.append(f"{file} holds {name!r}, but the index {place}")
            found[name] = info
    problems += [f"the index puts {name!r} in {file}, which lacks it" for name, file in names.items() if name not in found]
    if problems:
        raise CheckpointError(f"{path} must match its files; fetch the folder again:\n  " + listed(problems))
    return found


class Files:
    """Files that are opened when they are first needed, and closed at the end of the `with` block."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._fds: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes all open files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, file: Path) -> int:
        with self._opening:
            if file not in self._fds:
                self._fds[file] = os.open(file, self._flags)
                self._opened(file, self._fds[file])
            return self._fds[file]

    def _opened(self, file: Path, fd: int) -> None:
        """Called once for every file, right after it is opened."""


class Reader(Files):
    """Reads boxes of tensors in weight files; several threads may share one. Use as a context manager.

    A box of long contiguous runs is read by position. One of short runs, such as a column cut, is copied out of a mapping of the
    file (`way="mapped"`), or out of whole rows that are read by position ("sequential", for network file systems, where a mapping
    would fetch page by page); "auto" depends on the file system. `bytes_copied` counts bytes copied into parameters, `fetched` the
    pages that were read for them.
    """

    def __init__(self, infos: Iterable[TensorInfo], *, way: Way = "auto") -> None:
        super().__init__(os.O_RDONLY)
        if way not in get_args(Way):
            raise ConfigError(f"reader={way!r} must be one of {', '.join(get_args(Way))}.")
        self._stamps: dict[Path, Stamp] = {}
        self._growing: set[Path] = set()  # files that are being written: only their size must stay the same
        for stored in (stored for info in infos for stored in stored_tensors(info)):
            if stored.file not in self._stamps:
                self._stamps[stored.file] = stored.stamp or stamp_of(stored.file)
                if stored.stamp is None:
                    self._growing.add(stored.file)
        self._ways: dict[Path, Way] = {file: way for file in self._stamps if way != "auto"}
        self._maps: dict[Path, mmap.mmap] = {}  # unmapped when the last view goes
        self.bytes_copied = 0
        self.fetched: dict[Path, list[tuple[int, int]]] = {}
        self._counting = threading.Lock()

    def way(self, file: Path) -> Way:
        """The way in which short runs of `file` are read: "mapped" or "sequential"."""
        if file not in self._ways:
            self._ways[file] = "sequential" if is_remote(file) else "mapped"
        return self._ways[file]

    def mapped(self, info: TensorInfo) -> torch.Tensor:
        """Returns the whole tensor as a view of the mapped file, of which only used pages are read. Must not be written.

        Not for quantised tensors.
        """
        assert info.encoding is None, info.name
        if info.elements == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        self.check(info.file)
        with self._opening:
            if info.file not in self._maps:
                crash_notes.note_mapping(info.file, self._stamps[info.file][1])
                self._maps[info.file] = mmap.mmap(
                    self._fds[info.file], 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        return torch.frombuffer(self._maps[info.file], dtype=info.dtype, count=info.elements, offset=info.start).view(info.shape)

    def box(self, info: TensorInfo, transfer: Transfer) -> torch.Tensor:
        """Returns the file's side of `transfer` as a view of the mapped file."""
        return view(self.mapped(info), transfer.hf_view())

    def parts(self, info: TensorInfo, transfer: Transfer, limit: int = PIECE) -> Iterator[Transfer]:
        """Splits `transfer` into parts of at most `limit` (up to PIECE) bytes, each for one `fetch` or `read_into`."""
        if info.encoding is not None:
            yield from self._encoded_parts(info, transfer)
            return
        for part in transfer.split(max(1, limit // info.dtype.itemsize)) if transfer.elements else ():
            if self.way(info.file) == "sequential" and not _is_long(info, part):
                yield from narrow(part, limit // info.dtype.itemsize)
            else:
                yield part

    def _encoded_parts(self, info: TensorInfo, part: Transfer) -> Iterator[Transfer]:
        encoding = info.encoding
        assert encoding is not None
        boxes = encoding.boxes(part) if part.elements else ()
        if part.elements > 1 and any(box.elements > DECODED or not self._is_one(one, box) for one, box in ((info, part), *boxes)):
            for half in encoding.codec.halves(part):
                yield from self._encoded_parts(info, half)
        elif part.elements:
            yield part

    def _is_one(self, info: TensorInfo, box: Transfer) -> bool:
        """Whether one `fetch` can read the box."""
        return info.encoding is not None or self.way(info.file) == "mapped" or _is_long(info, box) or _span(info, box) <= PIECE

    def read_into(self, info: TensorInfo, part: Transfer, target: torch.Tensor) -> bool:
        """Reads `part` directly into its native side in `target`, a CPU tensor of the file's dtype.

        Returns False without reading if the runs that are contiguous on both sides are too short, and for a quantised tensor.
        """
        if info.encoding is not None:
            return False
        found = contiguous_runs(part, target.stride())
        length = found.length * info.dtype.itemsize
        if length < LONG:
            return False
        base, itemsize = target.data_ptr(), info.dtype.itemsize
        for start, natives in found.adjacent():
            self._pread(info, start * itemsize, [_memory(base + native * itemsize, length) for native in natives])
        return True

    def fetch(self, info: TensorInfo, part: Transfer, buffer: Callable[[], torch.Tensor]) -> Fetched:
        """Returns the file's side of `part` (see `parts`), in the mapped file or in `buffer()`, a CPU tensor of PIECE bytes.

        A quantised tensor is decoded, into new memory.
        """
        if info.encoding is not None:
            return self.decode(info, part, None, buffer)
        itemsize = info.dtype.itemsize
        sizes, strides, offset = part.hf_view()
        if _is_long(info, part):
            length, starts = part.contiguous_runs()
            flat = buffer()
            place = flat.data_ptr()
            for start in starts:
                self._pread(info, start * itemsize, [_memory(place, length * itemsize)])
                place += length * itemsize
            return Fetched(
                flat[: part.elements * itemsize].view(info.dtype), (sizes, list(contiguous_strides(tuple(sizes))), 0), True
            )
        span = span_of(part)
        if self.way(info.file) == "mapped":
            self.count(info, offset, span)
            return Fetched(self.mapped(info).view(-1), (sizes, strides, offset), False)
        flat = buffer()
        self._pread(info, offset * itemsize, [_memory(flat.data_ptr(), span * itemsize)])
        return Fetched(flat[: span * itemsize].view(info.dtype), (sizes, strides, 0), True)

    def decode(self, info: TensorInfo, part: Transfer, packed: Fetched | None, buffer: Callable[[], torch.Tensor]) -> Fetched:
        """Decodes a part of a quantised tensor from its packed numbers (None: reads them) and its scales, using `buffer()`."""
        encoding = info.encoding
        assert encoding is not None
        (numbers, box), (scales, scales_box) = encoding.boxes(part)
        factors = self.fetch(scales, scales_box, buffer).box.reshape(sizes_of(scales_box)).clone()
        packed = packed or self.fetch(numbers, box, buffer)
        out = encoding.codec.decode(packed.box.reshape(sizes_of(box)), factors, part)
        steps = iter(out.stride())
        strides = []
        for axis in part.axes:
            step = 0 if axis.hf_dim is None else next(steps)
            strides += [axis.hf.block * step, step]
        return Fetched(out.as_strided((out.numel(),), (1,)), (part.hf_view()[0], strides, 0), False)

    def pread(self, file: Path, start: int, target: memoryview) -> None:
        """Fills `target` from byte `start` of `file`. Raises CheckpointError if the file ends early or can't be read."""
        self._pread_all(file, start, [target])

    def _pread(self, info: TensorInfo, offset: int, buffers: list[memoryview]) -> None:
        self._pread_all(info.file, info.start + offset, buffers)

    def _pread_all(self, file: Path, start: int, buffers: list[memoryview]) -> None:
        fd, position = self._fd(file), start
        self._count(file, start, start + sum(map(len, buffers)))
        while buffers:
            try:
                got = os.preadv(fd, buffers[:_IOV_MAX], position)
            except OSError as error:
                raise CheckpointError(f"reading {file} failed: {error.strerror}; check its disk and start again.") from error
            if got == 0:
                self.check(file)
                raise CheckpointError(f"{file} ended at byte {position}; fetch it again.")
            position += got
            while buffers and got >= len(buffers[0]):
                got -= len(buffers.pop(0))
            if got:
                buffers[0] = buffers[0][got:]

    def copied(self, nbytes: int) -> None:
        """Counts bytes that were copied into a parameter."""
        with self._counting:
            self.bytes_copied += nbytes

    def count(self, info: TensorInfo, offset: int, elements: int) -> None:
        """Counts a range of a mapped tensor as fetched, gaps included, which readahead fetches too."""
        start = info.start + offset * info.dtype.itemsize
        self._count(info.file, start, start + elements * info.dtype.itemsize)

    def _count(self, file: Path, start: int, stop: int) -> None:
        with self._counting:
            self.fetched.setdefault(file, []).append((start // PAGE, -(-stop // PAGE)))

    @override
    def _opened(self, file: Path, fd: int) -> None:
        self._compare(file, stamp_of(fd))

    def open_all(self) -> None:
        """Opens every file now, so that they stay readable if they are deleted. Raises CheckpointError if one has changed."""
        for file in self._stamps:
            try:
                self._fd(file)
            except OSError as error:
                raise CheckpointError(f"{file} can't be opened: {error.strerror}; fetch it again.") from error

    def check(self, file: Path) -> None:
        """Raises CheckpointError if the file has changed since its header was read."""
        self._compare(file, stamp_of(self._fd(file)))

    def _compare(self, file: Path, now: Stamp) -> None:
        then = self._stamps[file]
        if now != then and not (file in self._growing and now[1] == then[1]):
            what = f"had {then[1]} bytes and now has {now[1]}" if now[1] != then[1] else "is not the file that it was"
            raise CheckpointError(f"{file} {what}: it changed while being read; start again.")

    def finish(self) -> None:
        """Checks every file that was read again, also that no other file has its name now."""
        for file in list(self._fds):
            self.check(file)
            try:
                self._compare(file, stamp_of(file))
            except OSError as error:
                raise CheckpointError(f"{file} is gone ({error.strerror}): it changed while being read; start again.") from error


def stored_tensors(info: TensorInfo) -> tuple[TensorInfo, ...]:
    """Returns the stored tensors of a tensor: itself, or a quantised one's packed numbers and scales."""
    return (info,) if info.encoding is None else (info.encoding.packed, info.encoding.scales)


def stored_bytes(info: TensorInfo, part: Transfer) -> int:
    """Number of bytes in files for a part of a tensor."""
    boxes = ((info, part),) if info.encoding is None else info.encoding.boxes(part)
    return sum(box.elements * one.dtype.itemsize for one, box in boxes)


def _span(info: TensorInfo, part: Transfer) -> int:
    return span_of(part) * info.dtype.itemsize


def _is_long(info: TensorInfo, part: Transfer) -> bool:
    """Whether the file's side of `part` is worth positioned reads: its contiguous runs are long, or it is a single one."""
    length = hf_length(part)
    return length == part.elements or length * info.dtype.itemsize >= LONG


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")
