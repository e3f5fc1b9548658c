"""Replaces CUDA devices by the CPU in factories, `.cuda()`, `.to("cuda")`, pinned memory, and a tensor's type name.

Changes what torch does with device="cuda" (which megatron-core uses in factories, for example in
megatron/core/distributed/param_and_grad_buffer.py), and the type names that megatron/core/optimizer/optimizer.py:1009 compares.
A TorchFunctionMode, so it applies to the thread that installs it and to processes forked from it: another thread that runs
megatron-core enters `CudaMeansCpu` itself. torch 2.11 and later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, override

import torch
from torch.overrides import TorchFunctionMode

from megabridge.platform import patches
from megabridge.platform.patches.cuda_calls import CPU


class TypeName(str):
    """A CPU tensor's type name, equal to the CUDA name too, because megatron-core's optimizer takes only CUDA parameters."""

    __slots__ = ()

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) == other.replace("torch.cuda.", "torch.")

    @override
    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CudaMeansCpu(TorchFunctionMode):
    """Replaces CUDA devices in tensor functions by the CPU, for the thread that enters it."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):  # only a CUDA device gives pinned memory
                kwargs = {**kwargs, "pin_memory": False}
        else:
            kwargs = {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return TypeName(func(*args))
        return func(*args, **kwargs)


def install() -> None:
    """Installs it for this thread, permanently."""
    patches.check_torch(__name__)
    CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
