"""The device that this process works on, decided once, when this module is imported.

Every module that imports megatron imports this one first: on a CPU it redirects the CUDA calls that megatron-core makes
(cpu.py). The environment variable MEGABRIDGE_PLATFORM is `auto` (the default: cuda where torch sees a CUDA device, else
cpu), `cpu` or `cuda`. On cuda nothing of torch or megatron is replaced.
"""

from __future__ import annotations

import os
from typing import Final

import torch

from megabridge.errors import ConfigError
from megabridge.platform import quiet

CHOICES: Final = ("auto", "cpu", "cuda")


def _chosen() -> str:
    wanted = os.environ.get("MEGABRIDGE_PLATFORM", "auto") or "auto"
    if wanted not in CHOICES:
        raise ConfigError(f"MEGABRIDGE_PLATFORM={wanted!r} must be one of {', '.join(CHOICES)}.")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


DEVICE: Final[str] = _chosen()
"""`cpu` or `cuda`."""


def is_cpu() -> bool:
    """Whether megatron-core runs on the CPU in this process."""
    return DEVICE == "cpu"


def device() -> torch.device:
    """Where parameters and activations of this process live: the CPU, or this rank's current CUDA device."""
    return torch.device("cpu") if is_cpu() else torch.device("cuda", torch.cuda.current_device())


# With tensor parallelism megatron-core relies on kernels starting in the order of their calls, and warns without this.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
quiet.install()
if is_cpu():
    from megabridge.platform import cpu

    cpu.install()
