"""Replaces the functions of torch.cuda that megatron-core calls, for a CPU.

Replaces functions of torch/cuda/__init__.py, memory.py, random.py and streams.py, and torch.Tensor.record_stream: megatron-core
reads the current device, waits on streams and saves the CUDA generator's state. On a CPU everything is already ordered, so
streams and events do nothing, and the CPU's generator replaces the CUDA one. Measured with megatron-core 0.19.2 and torch 2.14; a
call that is not covered fails, because torch has no CUDA device to run it on.
"""

from __future__ import annotations

import contextlib
from typing import Final

import torch

from megabridge.errors import ConfigError
from megabridge.platform import patches

CPU: Final = torch.device("cpu")


class NoStream:
    """Replaces a CUDA stream or event: on a CPU everything is already ordered."""

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


def _nothing(*args: object, **kwargs: object) -> None: ...


def _zero(*args: object, **kwargs: object) -> int:
    return 0


def get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(state)


def _replacements() -> dict[str, object]:
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
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "max_memory_reserved": _zero,
        "reset_peak_memory_stats": _nothing,
    }


def install() -> None:
    """Installs the replacements. Raises ConfigError if torch is too old or lacks one of the functions."""
    patches.check_torch(__name__)
    replacements = _replacements()
    if gone := sorted(name for name in replacements if name not in vars(torch.cuda)):
        raise ConfigError(
            f"{__name__} replaces functions of torch.cuda, but torch {torch.__version__} has no {', '.join(gone)}; "
            f"pip install 'torch<{patches.TORCH[1]}'."
        )
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name, replacement in (("get_rng_state", get_rng_state), ("set_rng_state", set_rng_state)):
        setattr(torch.cuda.random, name, replacement)
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
