"""Sets of layers: megabridge's own on torch, Transformer Engine's, megatron-core's, and those of other packages."""

from megabridge.models.backends.backend import Backend
from megabridge.models.backends.registry import OURS, backend, chosen

__all__ = ["OURS", "Backend", "backend", "chosen"]
