"""Platform: the device of this process, chosen when this module is imported, and `prepare`, which makes megatron-core run on it.

The environment variable MEGABRIDGE_PLATFORM is `auto` (the default: cuda if torch sees a CUDA device, else cpu), `cpu` or
`cuda`. Importing this module changes nothing else.
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
    """Device of this process's parameters and activations: the CPU, or this rank's current CUDA device."""
    return torch.device("cpu") if is_cpu() else torch.device("cuda", torch.cuda.current_device())


@cache
def prepare() -> None:
    """Applies the patches that megatron-core needs before it is imported (patches/), once per process.

    Silences useless warnings; on a CPU it redirects the CUDA calls that megatron-core makes, and imports it. A rank's main function
    calls it, `megabridge.AutoBridge` does, and so do packages and modules that import megatron-core, so that importing them needs
    no call. On a CPU it works for the thread that calls it first (patches/cuda_devices.py). Raises ConfigError for versions of
    torch or megatron-core that the patches were not written for.
    """
    device_connections.install()
    quiet.install()
    if is_cpu():
        from megabridge.platform import cpu

        cpu.install()
