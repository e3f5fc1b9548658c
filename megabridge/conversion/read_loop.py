"""The read loop: a few threads read every box that this rank needs and pass it to a visitor. No collective, no whole tensor.

On CUDA each thread reads into its own pinned buffer and copies on its own stream, so that one thread copies while others read.
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

Progress = Callable[[int, int], None]  # bytes done and bytes in total, of this rank
_MOST_THREADS: Final = 8  # with a pinned buffer of PIECE bytes each, 64 MiB; on a CPU at most half of each is used
_TICK: Final = 0.05  # seconds between two reports of progress


def silent(done: int, total: int) -> None:
    """Reports no progress."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadTask:
    """A box of the tensor `info` and the local parameter `target` that holds it."""

    info: TensorInfo
    transfer: Transfer
    target: torch.Tensor


Visit = Callable[["ReadWorker", ReadTask, Transfer, Fetched], None]  # with a part of the task's transfer, and the file's side of it


class ReadWorker:
    """The resources of one reading thread: a buffer of PIECE bytes and, on CUDA, a stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer: torch.Tensor | None = None
        self._scratch: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.default_stream(device))

    def buffer(self) -> torch.Tensor:
        """Returns the buffer, 1-D of bytes, after waiting for copies out of it."""
        self.wait()
        if self._buffer is None:
            self._buffer = _pages(PIECE) if self._stream is None else torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        return self._buffer

    def converted(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns `tensor` in `dtype`, valid until the next call.

        On a CPU it is in the worker's own memory: with malloc, which keeps freed memory per thread, the process would grow by about
        all that it converts.
        """
        if tensor.dtype == dtype or tensor.device.type != "cpu":
            return tensor.to(dtype)
        size = tensor.numel() * dtype.itemsize
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = _pages(size)
        return self._scratch[:size].view(dtype).view(tensor.shape).copy_(tensor)

    def wait(self) -> None:
        """Waits for the operations on the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def stream(self) -> AbstractContextManager[object]:
        """Returns a context in which operations run on this worker's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def on_device(self, fetched: Fetched) -> torch.Tensor:
        """Returns the box on the parameters' device, in the file's dtype; valid inside `stream()`, until the next `buffer()`."""
        if self._stream is None:
            return fetched.box
        flat, geometry = fetched.flat, fetched.geometry
        if not fetched.is_buffered:  # short runs are packed on the CPU, so that only the box is copied to the device
            box = fetched.box
            packed = self.buffer()[: box.numel() * box.element_size()].view(box.dtype)
            packed.view(box.shape).copy_(box)
            flat, geometry = packed, (geometry[0], list(contiguous_strides(tuple(box.shape))), 0)
        return view(flat.to(self.device, non_blocking=True), geometry)


def _pages(size: int) -> torch.Tensor:
    """Allocates `size` bytes from the system, which are returned to it with the tensor; malloc would keep them per thread."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8, count=size)


def fill(worker: ReadWorker, task: ReadTask, part: Transfer, fetched: Fetched) -> None:
    """Copies a part into its parameter, cast to the parameter's dtype; a `Visit`."""
    box = native_box(task.target, part)
    if fetched.is_buffered and box.is_contiguous() and box.dtype == fetched.flat.dtype and fetched.box.is_contiguous():
        box.copy_(fetched.box, non_blocking=True)  # on CUDA directly from pinned memory into the parameter
    else:
        box.copy_(worker.on_device(fetched))


def threads_of_a_rank() -> int:
    """Returns how many threads read on this rank: its share of the host's cores, but at least two, as one may wait for the disk."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_MOST_THREADS, max(2, len(os.sched_getaffinity(0)) // ranks))


def run_tasks(
    reader: Reader, tasks: Sequence[ReadTask], visit: Visit, *, straight: bool = False, limit: int = PIECE, progress: Progress
) -> None:
    """Calls `visit` with every part of every task, in several threads; parts have at most `limit` bytes.

    With `straight`, a part whose bytes can be read directly into the parameter is, without a call of `visit`. Raises the first
    error of a thread when all have stopped.
    """
    ordered = sorted(tasks, key=lambda task: (task.info.file, task.info.start))
    total = bytes_of(tasks)

    def do(worker: ReadWorker, task: ReadTask, part: Transfer) -> None:
        same = straight and worker.device.type == "cpu" and task.target.dtype == task.info.dtype
        if not (same and reader.read_into(task.info, part, task.target)):
            visit(worker, task, part, reader.fetch(task.info, part, worker.buffer))
        reader.copied(stored_bytes(task.info, part))

    parts = ((task, part) for task in ordered for part in reader.parts(task.info, task.transfer, limit))
    _parallel(parts, do, device_of(tasks), lambda: progress(min(reader.bytes_copied, total), total))


def bytes_of(tasks: Sequence[ReadTask]) -> int:
    """Returns the bytes that the tasks read. The loop reads a little more where parts of a quantised tensor meet inside a block."""
    return sum(stored_bytes(task.info, task.transfer) for task in tasks if task.transfer.elements)


def device_of(tasks: Sequence[ReadTask]) -> torch.device:
    """Returns the device of the tasks' parameters."""
    return tasks[0].target.device if tasks else torch.device("cpu")


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
            worker = ReadWorker(device)
            with worker.stream():
                while not failures:
                    with taking:
                        item = next(work, None)
                    if item is None:
                        break
                    do(worker, *item)
            worker.wait()
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
    except BaseException as error:  # Ctrl-C: the threads stop after their current part
        failures.append(error)
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]
