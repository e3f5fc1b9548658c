"""Shared reads: the ranks of a node read every block of the files once between them, and copy their boxes out of shared memory.

The window is a ring of slots in one unnamed file in /dev/shm. Block i of the schedule is read by rank i modulo the node's ranks
into slot i modulo the slots, as soon as every rank is done with the block that was there. Ranks publish their progress in counters
in the file's first page, written and read by system calls, which order them after the data on any processor.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
import torch

from megabridge.conversion.read_loop import Progress, ReadTask, ReadWorker, Visit, bytes_of, device_of, run_tasks, silent
from megabridge.errors import CheckpointError
from megabridge.hf.contiguous_runs import span_of
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import PIECE, Fetched, Reader, stored_bytes, stored_tensors
from megabridge.mapping import Transfer
from megabridge.mapping.boxes import Axis, clip
from megabridge.parallel import collectives

SLOT: Final = 4 << 20  # bytes
SLOTS: Final = 15  # with the page of counters less than 64 MiB
_PAGE: Final = 4096
_MEMORY: Final = Path("/dev/shm")
_LOCKS: Final = 1 << 40  # rank n of a node holds a lock on this byte + n for as long as it lives
_POLL: Final = 0.0002  # seconds
_ALIVE: Final = 1.0  # seconds without progress after which a rank checks that the others are alive

Ranges = tuple[tuple[int, int], ...]  # start and stop per dimension


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes `start` to `stop` of a file: some whole tensors, or ranges of one."""

    file: Path
    start: int
    stop: int
    pieces: tuple[tuple[str, Ranges], ...]


def blocks_of(infos: Mapping[str, TensorInfo], limit: int) -> list[Block]:
    """Divides all tensors into blocks of at most `limit` bytes, in the order of the files; small neighbours share one.

    Quantised tensors are divided by their packed values; each rank reads the few scales for itself.
    """
    out: list[Block] = []
    for info in sorted(infos.values(), key=lambda info: (info.file.name, info.start)):
        if info.elements == 0:
            continue
        packed = stored_tensors(info)[0]
        for first, count, ranges in _ranges(packed.shape, max(1, limit // packed.dtype.itemsize)):
            start = info.start + first * packed.dtype.itemsize
            inner = ranges if info.encoding is None else info.encoding.codec.inside(ranges)
            block = Block(info.file, start, start + count * packed.dtype.itemsize, ((info.name, inner),))
            last = out[-1] if out else None
            if last is not None and last.file == block.file and last.stop == block.start and block.stop - last.start <= limit:
                out[-1] = replace(last, stop=block.stop, pieces=last.pieces + block.pieces)
            else:
                out.append(block)
    return out


def _ranges(shape: tuple[int, ...], most: int) -> Iterator[tuple[int, int, Ranges]]:
    """Yields (first element, elements, ranges) of contiguous pieces of at most `most` elements."""
    dim = next((d for d in range(len(shape)) if prod(shape[d + 1 :]) <= most), 0)
    inner = tuple((0, length) for length in shape[dim + 1 :])
    row = prod(shape[dim + 1 :])
    step = max(1, most // row)
    first = 0
    for outer in product(*map(range, shape[:dim])):
        fixed = tuple((index, index + 1) for index in outer)
        for start in range(0, shape[dim], step) if shape else [0]:
            stop = min(start + step, shape[dim]) if shape else 1
            yield first, (stop - start) * row, (*fixed, *(((start, stop),) if shape else ()), *inner)
            first += (stop - start) * row


def inside(transfer: Transfer, ranges: Ranges) -> Iterator[Transfer]:
    """Yields the parts of `transfer` whose Hugging Face side lies in `ranges`."""
    choices = [[axis] if axis.hf_dim is None else [_swapped(part) for part in clip(_swapped(axis), *ranges[axis.hf_dim])]
               for axis in transfer.axes]  # fmt: skip
    for axes in product(*choices):
        yield replace(transfer, axes=axes)


def _swapped(axis: Axis) -> Axis:
    return replace(axis, native=axis.hf, hf=axis.native)


def node_of_this_rank() -> str:
    """Returns a name that is equal for ranks that share memory: of the machine's boot, and of /dev/shm (one per container)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    memory = str(_MEMORY.stat().st_dev) if _MEMORY.is_dir() else f"none-{os.getpid()}"
    return f"{boot.read_text().strip() if boot.exists() else os.uname().nodename}:{memory}"


@dataclass(frozen=True, slots=True)
class SharedReads:
    """The plan of one shared read loop on a node: its blocks in order, this rank's parts of each, and the window."""

    schedule: tuple[Block, ...]
    parts: Mapping[int, Sequence[tuple[ReadTask, Transfer]]]
    index: int
    """Index of this rank among the node's ranks."""
    ranks: tuple[int, ...]
    fd: int
    window: mmap.mmap


def shared_reads(
    infos: Mapping[str, TensorInfo], tasks: Sequence[ReadTask], *, dedupe: bool
) -> AbstractContextManager[SharedReads | None]:
    """Returns a context with the plan of a shared read loop over `tasks`; without `dedupe` with None: every rank reads for itself.

    Collective; enter it outside of `collectives.raise_together`.
    """
    return _sharing(infos, tasks) if dedupe else nullcontext()


@contextmanager
def _sharing(infos: Mapping[str, TensorInfo], tasks: Sequence[ReadTask]) -> Iterator[SharedReads]:
    blocks = blocks_of(infos, SLOT)
    mine = _parts(blocks, tasks)
    found = collectives.all_gather((node_of_this_rank(), np.array(sorted(mine), dtype=np.int64)))
    ranks = tuple(number for number, (node, _) in enumerate(found) if node == found[collectives.rank()][0])
    schedule = np.unique(np.concatenate([found[number][1] for number in ranks])).tolist()
    fd = _open_window(ranks)
    window = mmap.mmap(fd, _PAGE + SLOTS * SLOT)
    places = {block: bisect_left(schedule, block) for block in mine}
    try:
        parts = {places[block]: entries for block, entries in mine.items()}
        yield SharedReads(tuple(blocks[block] for block in schedule), parts, ranks.index(collectives.rank()), ranks, fd, window)
    finally:
        os.close(fd)  # releases the lock too; the memory is freed with its last view


def _parts(blocks: list[Block], tasks: Sequence[ReadTask]) -> dict[int, list[tuple[ReadTask, Transfer]]]:
    of_tensor: dict[str, list[tuple[int, Ranges]]] = {}
    for number, block in enumerate(blocks):
        for name, ranges in block.pieces:
            of_tensor.setdefault(name, []).append((number, ranges))
    out: dict[int, list[tuple[ReadTask, Transfer]]] = {}
    for task in tasks:
        for number, ranges in of_tensor.get(task.info.name, ()):
            for part in inside(task.transfer, ranges):
                if part.elements:
                    out.setdefault(number, []).append((task, part))
    return out


def _open_window(ranks: tuple[int, ...]) -> int:
    """Returns a descriptor of the node's window, which the first rank creates. It has no name afterwards. Collective."""
    path: str | None = None
    size = _PAGE + SLOTS * SLOT
    with collectives.raise_together("making memory that the ranks of a node share"):
        if ranks[0] == collectives.rank():
            try:
                path = _reserved(size)
            except OSError as error:
                raise CheckpointError(
                    f"conversion.dedupe needs {size >> 20} MiB in {_MEMORY} ({error.strerror}); make it larger "
                    "(docker run --shm-size) or set conversion.dedupe=false."
                ) from error
    paths = collectives.all_gather(path)
    name = paths[ranks[0]]
    assert name is not None
    fd = -1
    try:
        with collectives.raise_together("opening memory that the ranks of a node share"):
            fd = os.open(name, os.O_RDWR)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKS + ranks.index(collectives.rank()))
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    finally:
        if path is not None:
            Path(path).unlink()
    return fd


def _reserved(size: int) -> str:
    """Creates a file in _MEMORY with all of its bytes reserved, and returns its name. Raises OSError."""
    made, path = tempfile.mkstemp(prefix="megabridge-", dir=_MEMORY)
    try:
        os.posix_fallocate(made, 0, size)
    except OSError:
        Path(path).unlink()
        raise
    finally:
        os.close(made)
    return path


def read_boxes(
    reader: Reader,
    tasks: Sequence[ReadTask],
    visit: Visit,
    *,
    shared: SharedReads | None,
    straight: bool = False,
    limit: int = PIECE,
    progress: Progress = silent,
) -> None:
    """Runs `run_tasks` over `tasks` or, together with the node's other ranks, over those that `shared` was made for."""
    if shared is None:
        run_tasks(reader, tasks, visit, straight=straight, limit=limit, progress=progress)
    else:
        total = bytes_of(tasks)
        _read_shared(reader, shared, visit, device_of(tasks), lambda: progress(reader.bytes_copied, total))


def _read_shared(reader: Reader, shared: SharedReads, visit: Visit, device: torch.device, tick: Callable[[], None]) -> None:
    """Reads this rank's blocks into the window and calls `visit` with its parts of every block.

    All ranks of the node call it together. When one fails, the others return early; `collectives.raise_together` then raises.
    """
    state = _Counters(shared)
    worker = ReadWorker(device)
    total, mine = len(shared.schedule), shared.index
    to_read, done, seen = mine, 0, time.monotonic()
    try:
        while to_read < total or done < total:
            filled, slowest, failed = state.read()
            if failed:
                return
            if to_read < total and slowest > to_read - SLOTS:
                _fill(reader, shared, to_read)
                state.fill(to_read)
                to_read += len(shared.ranks)
            elif done < total and (done not in shared.parts or filled[done % SLOTS] == done + 1):
                with worker.stream():
                    _use(reader, shared, done, worker, visit)
                done += 1
                state.done(done)
                tick()
            else:
                if time.monotonic() - seen > _ALIVE:
                    state.check_alive(total)
                    seen = time.monotonic()
                time.sleep(_POLL)
                continue
            seen = time.monotonic()
        worker.wait()
    except BaseException:
        state.fail()
        raise


def _fill(reader: Reader, shared: SharedReads, number: int) -> None:
    block = shared.schedule[number]
    place = _PAGE + number % SLOTS * SLOT
    reader.pread(block.file, block.start, memoryview(shared.window)[place : place + block.stop - block.start])


def _use(reader: Reader, shared: SharedReads, number: int, worker: ReadWorker, visit: Visit) -> None:
    for task, part in shared.parts.get(number, ()):
        if task.info.encoding is None:
            visit(worker, task, part, _from_window(shared, number, task.info, part))
            reader.copied(stored_bytes(task.info, part))
            continue
        for piece in reader.parts(task.info, part):
            (packed, box), _ = task.info.encoding.boxes(piece)
            visit(worker, task, piece, reader.decode(task.info, piece, _from_window(shared, number, packed, box), worker.buffer))
            reader.copied(stored_bytes(task.info, piece))


def _from_window(shared: SharedReads, number: int, info: TensorInfo, box: Transfer) -> Fetched:
    sizes, strides, offset = box.hf_view()
    place = _PAGE + number % SLOTS * SLOT + info.start + offset * info.dtype.itemsize - shared.schedule[number].start
    return Fetched(torch.frombuffer(shared.window, dtype=info.dtype, count=span_of(box), offset=place), (sizes, strides, 0), False)


class _Counters:
    """The counters in the window's first page: whether a rank failed, each slot's block (+ 1), blocks that each rank has done."""

    def __init__(self, shared: SharedReads) -> None:
        self._shared = shared
        self._size = 8 * (1 + SLOTS + len(shared.ranks))

    def read(self) -> tuple[list[int], int, bool]:
        """Returns (the slots' blocks + 1, the number of blocks that every rank has done, whether a rank failed)."""
        words = np.frombuffer(os.pread(self._shared.fd, self._size, 0), dtype=np.int64).tolist()
        return words[1 : 1 + SLOTS], min(words[1 + SLOTS :]), bool(words[0])

    def fill(self, number: int) -> None:
        self._write(1 + number % SLOTS, number + 1)

    def done(self, count: int) -> None:
        self._write(1 + SLOTS + self._shared.index, count)

    def fail(self) -> None:
        self._write(0, 1)

    def _write(self, word: int, value: int) -> None:
        os.pwrite(self._shared.fd, value.to_bytes(8, "little"), 8 * word)

    def check_alive(self, total: int) -> None:
        """Raises CheckpointError when a rank that isn't done has died, as its free lock shows."""
        words = np.frombuffer(os.pread(self._shared.fd, self._size, 0), dtype=np.int64).tolist()
        for index, rank in enumerate(self._shared.ranks):
            if index == self._shared.index or words[1 + SLOTS + index] == total:
                continue
            try:
                fcntl.lockf(self._shared.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKS + index)
            except OSError:
                continue
            raise CheckpointError(f"rank {rank} died while this node's ranks read together; see its output, and start again.")
