"""Runs megatron-core's writer of torch_dist files in this process, and reports its errors and what it writes.

Stands for parts of megatron/core/dist_checkpointing/strategies/filesystem_async.py: `_results_queue` (:49; it would start a process
that serves a queue between processes), `_process_memory` (:658; it measures memory for a debug line, and raises where psutil is
missing), `_write_item` (:394-420, torch's: what is written to which file is nowhere else to be had; and a file that refuses a write
ends the process at the next garbage collection, see _Held), and its logger, which is told of an error that is not raised.
megatron-core 0.19.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, override

from megabridge.platform import patches


class _Errors(logging.Filter):
    """Collects errors that the writer logs instead of raising them."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self.kept = kept

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        self.kept.append(record.getMessage().removeprefix("Local worker 0 encountered an error: "))
        return False


class _Held:
    """A file whose error waits until torch's frames are gone: they hold a buffer of io.BytesIO, at which CPython's collector
    crashes where it finds the two in a cycle, as an error and its frames are."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._try(lambda: self.stream.write(data))
        return len(data)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self.error is None:
            try:
                act()
            except OSError as error:
                self.error = error.with_traceback(None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def installed(note: Callable[[str, int, Any], None], errors: list[str]) -> Iterator[None]:
    """Within the block `note(file, offset, data)` is called for each written item, and error messages are added to `errors`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    patches.check_megatron(__name__)
    before = {name: getattr(filesystem_async, name) for name in ("_write_item", "_results_queue", "_process_memory")}
    write, filtering = filesystem_async._write_item, _Errors(errors)

    @wraps(write)  # the caller inspects its signature
    def noting(*args: Any, **kwargs: Any) -> Any:
        transforms, stream, data, item, file = args
        held = _Held(stream)
        result = write(transforms, held, data, item, file, **kwargs)
        if held.error is not None:
            raise held.error
        note(file, result.storage_data.offset, data)
        return result

    filesystem_async._write_item = noting
    if before["_results_queue"] is None:
        filesystem_async._results_queue = queue.Queue()
    if not filesystem_async.HAVE_PSUTIL:
        filesystem_async._process_memory = lambda: 0
    filesystem_async.logger.addFilter(filtering)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(filesystem_async, name, value)
        filesystem_async.logger.removeFilter(filtering)
