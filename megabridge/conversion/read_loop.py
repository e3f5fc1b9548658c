"""The read loop: every box that this rank needs, read by a few threads and handed to a visitor. No collective, no whole tensor.

On CUDA each thread reads into a pinned buffer of its own and copies on a stream of its own, so that one thread's copy runs while
others read.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch

from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import PIECE, Fetched, Reader, native_box, stored_bytes, view
from megabridge.mapping import Transfer
from megabridge.mapping.transfer import contiguous_strides

Progress = Callable[[int, int], None]  # bytes done and bytes in all, of this rank
_MOST_THREADS: Final = 8  # with a pinned buffer of PIECE bytes each, 64 MiB; on a CPU no more than half of one is used
_TICK: Final = 0.05  # seconds between two reports of progress


def silent(done: int, total: int) -> None:
    """A progress report that shows nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadTask:
    """A box of the tensor `info` and the local parameter `target` that holds it."""

    info: TensorInfo
    transfer: Transfer
    target: torch.Tensor


Visit = Callable[["ReadWorker", ReadTask, Transfer, Fetched], None]  # a part of the job's transfer, and the file's side of it


class ReadWorker:
    """What one thread reads through: a buffer of PIECE bytes, and on CUDA a stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer: torch.Tensor | None = None
        self._scratch: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.default_stream(device))

    def buffer(self) -> torch.Tensor:
        """The buffer, when copies out of it have ended. Bytes, 1-D."""
        self.wait()
        if self._buffer is None:
            self._buffer = _pages(PIECE) if self._stream is None else torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        return self._buffer

    def converted(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`tensor` in `dtype`, to be used before the next call.

        On a CPU in memory of the lane's own: what threads take from malloc and give back again and again, a process keeps, and
        would grow by about all that it converts.
        """
        if tensor.dtype == dtype or tensor.device.type != "cpu":
            return tensor.to(dtype)
        size = tensor.numel() * dtype.itemsize
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = _pages(size)
        return self._scratch[:size].view(dtype).view(tensor.shape).copy_(tensor)

    def wait(self) -> None:
        """Waits for what was started on the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def stream(self) -> AbstractContextManager[object]:
        """A context in which operations run on this lane's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def on_device(self, fetched: Fetched) -> torch.Tensor:
        """The box on the parameters' device, in the file's dtype; to be used inside `stream()`, before the next `buffer()`."""
        if self._stream is None:
            return fetched.box
        flat, geometry = fetched.flat, fetched.geometry
        if not fetched.is_buffered:  # short stretches are put together on the CPU, so that only the box is copied to the device
            box = fetched.box
            packed = self.buffer()[: box.numel() * box.element_size()].view(box.dtype)
            packed.view(box.shape).copy_(box)
            flat, geometry = packed, (geometry[0], list(contiguous_strides(tuple(box.shape))), 0)
        return view(flat.to(self.device, non_blocking=True), geometry)


def _pages(size: int) -> torch.Tensor:
    """`size` bytes straight from the system, which gets them back when the tensor goes; malloc would keep them per thread."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8, count=size)


def fill(lane: ReadWorker, job: ReadTask, part: Transfer, fetched: Fetched) -> None:
    """The visit that copies a part into its parameter, cast to the parameter's dtype."""
    box = native_box(job.target, part)
    if fetched.is_buffered and box.is_contiguous() and box.dtype == fetched.flat.dtype and fetched.box.is_contiguous():
        box.copy_(fetched.box, non_blocking=True)  # on CUDA from pinned memory right into the parameter
    else:
        box.copy_(lane.on_device(fetched))


def threads_of_a_rank() -> int:
    """How many threads read on this rank: the ranks of a host share its cores, but while one waits for a disk another can work."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_MOST_THREADS, max(2, len(os.sched_getaffinity(0)) // ranks))


def run_tasks(
    reader: Reader, jobs: Sequence[ReadTask], visit: Visit, *, straight: bool = False, limit: int = PIECE, progress: Progress
) -> None:
    """Calls `visit` with every part of every job, in several threads; parts have at most `limit` bytes.

    With `straight`, a part whose bytes can be read right into the parameter is, and `visit` isn't called for it. Raises the first
    error of a thread when all have stopped.
    """
    ordered = sorted(jobs, key=lambda job: (job.info.file, job.info.start))
    total = bytes_of(jobs)

    def do(lane: ReadWorker, job: ReadTask, part: Transfer) -> None:
        same = straight and lane.device.type == "cpu" and job.target.dtype == job.info.dtype
        if not (same and reader.read_into(job.info, part, job.target)):
            visit(lane, job, part, reader.fetch(job.info, part, lane.buffer))
        reader.copied(stored_bytes(job.info, part))

    parts = ((job, part) for job in ordered for part in reader.parts(job.info, job.transfer, limit))
    _parallel(parts, do, device_of(jobs), lambda: progress(min(reader.bytes_copied, total), total))


def bytes_of(jobs: Sequence[ReadTask]) -> int:
    """What the jobs copy out of the files. A walk copies a little more where parts of a quantised tensor meet inside a block."""
    return sum(stored_bytes(job.info, job.transfer) for job in jobs if job.transfer.elements)


def device_of(jobs: Sequence[ReadTask]) -> torch.device:
    """Where the jobs' parameters live."""
    return jobs[0].target.device if jobs else torch.device("cpu")


def _parallel(
    work: Iterator[tuple[ReadTask, Transfer]],
    do: Callable[[ReadWorker, ReadTask, Transfer], None],
    device: torch.device,
    tick: Callable[[], None],
) -> None:
    taking = threading.Lock()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            lane = ReadWorker(device)
            with lane.stream():
                while not failures:
                    with taking:
                        item = next(work, None)
                    if item is None:
                        break
                    do(lane, *item)
            lane.wait()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, name=f"reader-{number}") for number in range(threads_of_a_rank())]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK)
                tick()
    except BaseException as error:  # Ctrl-C: the threads stop after what they do now
        failures.append(error)
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]
