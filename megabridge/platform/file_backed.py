"""Allocates parameters in a memory-mapped file, so that a process can hold a model larger than its memory.

When memory is short, the kernel writes pages to the file and drops them, which it can't do with anonymous memory without
swap. Only for conversion on a CPU: a training step touches every page.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final, override

import torch
from torch.overrides import TorchFunctionMode

import megabridge.platform as platform
from megabridge.errors import CheckpointError

SMALLEST: Final = 1 << 16
"""Bytes below which a tensor is allocated in ordinary memory."""
_UNDERSTOOD: Final = {"size", "dtype", "device", "requires_grad"}


@contextlib.contextmanager
def file_backed(folder: Path) -> Iterator[None]:
    """Within the block `torch.empty` allocates CPU tensors in an unlinked file in `folder`; they may outlive the block.

    Space is reserved when a tensor is allocated. Raises CheckpointError if the file system has no room for it.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=".parameters-", dir=folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} can't take a file for the model's parameters: {error.strerror}; free some space there, or write elsewhere."
        ) from error
    Path(name).unlink()  # so it is deleted with its last mapping, however the process ends
    try:
        with _Allocating(descriptor, folder):
            yield
    finally:
        os.close(descriptor)


class _Allocating(TorchFunctionMode):
    """Allocates the tensors of `torch.empty` in an open file."""

    def __init__(self, descriptor: int, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._fd = descriptor
        self._size = 0

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = None
        if func is torch.empty:
            made = self._empty(args, kwargs or {})
        return func(*args, **(kwargs or {})) if made is None else made

    def _empty(self, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Allocates the tensor of torch.empty(*args, **kwargs); None if it should be in ordinary memory."""
        size = kwargs.get("size", args)
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        device = torch.device("cpu" if kwargs.get("device") is None else kwargs["device"]).type
        is_on_cpu = device == "cpu" or (device == "cuda" and platform.is_cpu())
        if kwargs.keys() - _UNDERSTOOD or not is_on_cpu or prod(shape) * dtype.itemsize < SMALLEST:
            return None
        return self._mapped(shape, dtype).requires_grad_(bool(kwargs.get("requires_grad", False)))

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        length = prod(shape) * dtype.itemsize
        reserved = -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Without a reserved block the first write to a page could end the process (SIGBUS).
            os.posix_fallocate(self._fd, self._size, reserved)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} has no room for the model's parameters ({length} more bytes after {self._size}: "
                f"{error.strerror}); free some, or write to another file system."
            ) from error
        memory = mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED, offset=self._size)
        self._size += reserved
        return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)
