"""Lets megatron-core run where there is no CUDA: its CUDA calls end on the CPU. Each patch says in its file what it stands for."""

from __future__ import annotations

from typing import Final

from megabridge.platform.patches import cuda_calls, cuda_devices, host_splits, no_compile, rng_states

_state: Final = {"installed": False}


def is_installed() -> bool:
    """Whether this process redirects CUDA calls."""
    return _state["installed"]


def install() -> None:
    """Redirects the CUDA calls of this process, and imports megatron-core under the redirection. Idempotent."""
    if _state["installed"]:
        return
    cuda_calls.install()
    cuda_devices.install()
    with no_compile.installed():
        rng_states.install()
        host_splits.install()
    _state["installed"] = True
