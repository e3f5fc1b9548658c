"""Makes megatron-core run without CUDA by redirecting its CUDA calls to the CPU. Each patch documents what it replaces."""

from __future__ import annotations

from typing import Final

from megabridge.platform.patches import cuda_calls, cuda_devices, host_splits, no_compile, rng_states

_state: Final = {"installed": False}


def is_installed() -> bool:
    """Whether CUDA calls of this process are redirected."""
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
