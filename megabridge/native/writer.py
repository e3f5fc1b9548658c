"""Writes a sharded state as a torch_dist folder with megatron-core's writer, and takes the digest of each box that is written."""

from __future__ import annotations

import ctypes
import logging
import pickle
import queue
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, override

import torch
from torch.distributed.checkpoint.api import CheckpointException

import megabridge.platform  # noqa: F401
from megabridge.errors import CheckpointError
from megabridge.native import digests
from megabridge.parallel.collectives import all_gather, all_gather_bytes, rank
from megabridge.platform import quiet

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async

# A synchronous save goes through the same function, so the advice to use another package for asynchronous ones comes up.
quiet.drop("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated")


def write(state: dict[str, Any], folder: Path) -> digests.Boxes:
    """Writes `state` into the empty `folder`, in this process, and returns the digests of all ranks' boxes on rank 0.

    Every rank calls it. Raises the cause where any rank's file can't be written.
    """
    if filesystem_async._results_queue is None:
        # It would start a process that serves a queue between processes.
        filesystem_async._results_queue = queue.Queue()
    if not filesystem_async.HAVE_PSUTIL:
        # It measures memory for a debug line, and raises where psutil is missing.
        filesystem_async._process_memory = lambda: 0
    causes = _Causes()
    filesystem_async.logger.addFilter(causes)
    try:
        with _digesting() as own:
            dist_checkpointing.save(_without_views(state), str(folder))
    except CheckpointException as error:  # on every rank; it is no Exception, and names the cause's type only
        messages = [message for found in all_gather(causes.found) for message in found]
        raise CheckpointError(messages[0] if messages else str(error)) from error
    finally:
        filesystem_async.logger.removeFilter(causes)
    boxes: dict[str, dict[int, str]] = {}
    for content in all_gather_bytes(bytearray(zlib.compress(pickle.dumps(own), 1))):
        if rank() == 0:
            boxes |= pickle.loads(zlib.decompress(content))  # each rank writes files of its own
    return boxes


@contextmanager
def _digesting() -> Iterator[dict[str, dict[int, str]]]:
    """While entered, the digests of what megatron-core's writer writes, by file and offset; of the memory that it writes."""
    write = filesystem_async._write_item
    found: dict[str, dict[int, str]] = {}

    @wraps(write)  # its signature is asked for
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        _, _, data, _, file = args
        found.setdefault(file, {})[result.storage_data.offset] = digests.of_box(data)
        return result

    filesystem_async._write_item = noting
    try:
        yield found
    finally:
        filesystem_async._write_item = write


class _Causes(logging.Filter):
    """Keeps what the writer logs as an error instead of raising it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        self.found.append(record.getMessage().removeprefix("Local worker 0 encountered an error: "))
        return False


def _without_views(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with every CPU tensor over the same memory as a storage of its own: megatron-core's writer copies views first."""
    apply_factories(state)

    def alone(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor) and isinstance(entry.data, torch.Tensor):
            entry.data = _alone(entry.data)
        return entry

    dict_list_map_inplace(alone, state)
    return state


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    is_view = tensor.untyped_storage().size() != tensor.nbytes
    if tensor.device.type != "cpu" or not is_view or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # which may be held by nothing else: the optimizer's entries are made for the save
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
