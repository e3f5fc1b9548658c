"""The device that this process works on, decided when this module is imported, and `prepare`, which lets megatron-core run on it.

The environment variable MEGABRIDGE_PLATFORM is `auto` (the default: cuda where torch sees a CUDA device, else cpu), `cpu` or
`cuda`. Importing this changes nothing.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Final

import torch

from megabridge.errors import ConfigError
from megabridge.platform.patches import device_connections, quiet

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


@cache
def prepare() -> None:
    """Makes the changes to this process that megatron-core needs before it is imported, once (patches/ has them).

    Warnings that say nothing are silenced; on a CPU the CUDA calls that megatron-core makes are redirected, and it is imported. The
    program of a rank calls it, `megabridge.AutoBridge` does, and so does the `__init__` of a room that is about megatron-core, or
    elsewhere the module: whoever imports one of these needs no call. On a CPU it holds for the thread that calls it first
    (patches/cuda_devices.py). Raises ConfigError for versions of torch or megatron-core that it was not written for.
    """
    device_connections.install()
    quiet.install()
    if is_cpu():
        from megabridge.platform import cpu

        cpu.install()
