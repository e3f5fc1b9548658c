"""Writes a sharded state as a torch_dist folder with megatron-core's writer, and computes the digest of each box."""

from __future__ import annotations

import ctypes
import pickle
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megabridge.errors import CheckpointError
from megabridge.native import digests
from megabridge.parallel.collectives import all_gather, all_gather_bytes, rank
from megabridge.platform.patches import checkpoint_writer

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories


def write(state: dict[str, Any], folder: Path) -> digests.Boxes:
    """Writes `state` into the empty `folder`, in this process; returns the digests of all ranks' boxes on rank 0.

    Every rank calls it. Raises CheckpointError with the cause if the file of any rank can't be written.
    """
    own: dict[str, dict[int, str]] = {}
    causes: list[str] = []

    def note(file: str, offset: int, data: Any) -> None:
        own.setdefault(file, {})[offset] = digests.of_box(data)  # from the memory that is written

    try:
        with checkpoint_writer.installed(note, causes):
            dist_checkpointing.save(_without_views(state), str(folder))
    except CheckpointException as error:  # on every rank; a BaseException that names the cause's type only
        messages = [message for found in all_gather(causes) for message in found]
        raise CheckpointError(messages[0] if messages else str(error)) from error
    boxes: dict[str, dict[int, str]] = {}
    for content in all_gather_bytes(bytearray(zlib.compress(pickle.dumps(own), 1))):
        if rank() == 0:
            boxes |= pickle.loads(zlib.decompress(content))  # each rank writes files of its own
    return boxes


def _without_views(state: dict[str, Any]) -> dict[str, Any]:
    """Gives every CPU tensor in `state` a storage of its own over the same memory, because megatron-core's writer copies views."""
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
    memory.owner = tensor  # keeps it alive: nothing else may hold it, since the optimizer's entries are made for the save
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
