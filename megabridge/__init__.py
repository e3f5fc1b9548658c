"""megabridge: train Hugging Face models with Megatron-Core, configured by Hydra, bit-exact both ways.

Importing this package imports neither torch nor megatron: `AutoBridge` is imported when it is first used. Only then does
`megabridge.platform.prepare` apply the patches of torch that megatron-core needs on a host without CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megabridge.version import VERSION as __version__

if TYPE_CHECKING:
    from megabridge.bridge.auto_bridge import AutoBridge

__all__ = ["AutoBridge", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "AutoBridge":
        from megabridge.platform import prepare

        prepare()  # before megatron-core is imported
        from megabridge.bridge.auto_bridge import AutoBridge

        return AutoBridge
    raise AttributeError(f"module 'megabridge' has no attribute {name!r}")
