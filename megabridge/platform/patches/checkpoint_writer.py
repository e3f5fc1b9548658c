"""Runs megatron-core's writer of torch_dist files in this process, and reports its errors and what it writes.

Replaces parts of megatron/core/dist_checkpointing/strategies/filesystem_async.py: `_results_queue` (:49; it would start a process
to serve a queue between processes), `_process_memory` (:658; it measures memory for a debug line, and raises without psutil),
`_write_item` (:394-420, torch's: no other place has the data and the file of an item), and its logger, which gets errors that are
not raised. megatron-core 0.19.
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


@contextmanager
def installed(note: Callable[[str, int, Any], None], errors: list[str]) -> Iterator[None]:
    """Within the block `note(file, offset, data)` is called for each written item, and error messages are added to `errors`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    patches.check_megatron(__name__)
    before = {name: getattr(filesystem_async, name) for name in ("_write_item", "_results_queue", "_process_memory")}
    write, filtering = filesystem_async._write_item, _Errors(errors)

    @wraps(write)  # the caller inspects its signature
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        _, _, data, _, file = args
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
