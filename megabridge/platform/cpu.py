"""Lets megatron-core run where there is no CUDA: its CUDA calls end on the CPU.

megatron-core asks `torch.cuda.current_device()` for a device, says `device="cuda"` in factories, waits on streams and
saves the CUDA generator's state. On a CPU everything is already ordered, so streams and events do nothing, and the
CPU's generator stands for the CUDA one. Measured with megatron-core 0.19.2 and torch 2.14; a call that is not covered
fails loudly, because torch has no CUDA device to run it on.

The redirection of tensor functions is a TorchFunctionMode, and so belongs to the thread that imported this module (and
to the processes forked from it). Another thread that runs megatron-core enters `CudaMeansCpu` itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, override

import torch
from torch.overrides import TorchFunctionMode

from megabridge.platform import quiet

CPU: Final = torch.device("cpu")
_state = {"installed": False}


class NoStream:
    """Stands for a CUDA stream or event: on a CPU everything is already ordered."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, *args: object) -> None: ...

    def wait_event(self, *args: object) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *args: object) -> None: ...

    def wait(self, *args: object) -> None: ...

    def record_event(self, *args: object) -> NoStream:
        return NoStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: NoStream) -> float:
        return 0.0


class TypeName(str):
    """A CPU tensor's type name, equal to the CUDA name too: megatron-core's optimizer takes only CUDA parameters."""

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
    """Rewrites CUDA devices in tensor functions to the CPU, for the thread that enters it."""

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


def _nothing(*args: object, **kwargs: object) -> None: ...


def _zero(*args: object, **kwargs: object) -> int:
    return 0


def _get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(state)


def _cuda_functions() -> dict[str, object]:
    """What replaces the functions of torch.cuda that megatron-core calls."""
    stream = NoStream()
    return {
        "is_available": lambda: False,  # also on a host that has a GPU, with MEGABRIDGE_PLATFORM=cpu
        "device_count": _zero,
        "Stream": NoStream,
        "Event": NoStream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda *args: contextlib.nullcontext(),
        "current_device": lambda: CPU,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "max_memory_reserved": _zero,
        "reset_peak_memory_stats": _nothing,
    }


def _uncompiled(model: Any = None, **kwargs: object) -> Any:
    """torch.compile that gives back what it is given, as a call and as a decorator with arguments."""
    return model if model is not None else (lambda function: function)


@contextlib.contextmanager
def _compile_stubbed() -> Iterator[None]:
    """megatron-core compiles its fused functions while it is imported: seconds of inductor, and a C++ compiler."""
    real = torch.compile
    torch.compile = _uncompiled
    try:
        yield
    finally:
        torch.compile = real


def _host_splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """All-to-all splits as host integers: megatron-core converts them only when they lie on a CUDA device."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _import_megatron() -> None:
    with _compile_stubbed():  # whatever imports megatron.core.jit's decorator later gets the stub too
        import megatron.core.tensor_parallel.random as megatron_random
        import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # Both reach for torch.cuda.default_generators, which is empty without a device.
    megatron_random._set_cuda_rng_state = _set_rng_state
    megatron_random._get_cuda_rng_state = _get_rng_state
    token_dispatcher.maybe_move_tensor_to_cpu = _host_splits
    # True on every fork of the generator here, because the CPU's generator is the tracked one.
    quiet.drop("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context")


def is_installed() -> bool:
    """Whether this process redirects CUDA calls."""
    return _state["installed"]


def install() -> None:
    """Redirects the CUDA calls of this process, and imports megatron-core under the redirection. Idempotent."""
    if _state["installed"]:
        return
    _state["installed"] = True
    for name, replacement in _cuda_functions().items():
        setattr(torch.cuda, name, replacement)
    for name, replacement in (("get_rng_state", _get_rng_state), ("set_rng_state", _set_rng_state)):
        setattr(torch.cuda.random, name, replacement)
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
    _import_megatron()
