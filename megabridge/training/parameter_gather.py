"""optimizer.overlap_param_gather: parameters are whole only where something else than a training step reads them.

With it, DDP's hooks gather updated parameters during the next forward pass. Validation, saves and callbacks need them whole
before, so the hooks are on during training steps only, as in megatron/training/training.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ParameterGather:
    """The hooks of all chunks. Every rank calls `pause` and `go_on` at the same steps; both may be called twice."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
        self._is_on = bool(self._chunks)
        self.pause(sync=False)  # the first parameters are whole everywhere

    def pause(self, *, sync: bool = True) -> None:
        """Makes parameters whole (unless not `sync`: where they are overwritten next) and leaves them so."""
        if self._is_on:
            for chunk in self._chunks:
                chunk.disable_forward_pre_hook(param_sync=sync)
            self._is_on = False

    def go_on(self) -> None:
        """Gathers during forward passes from here on."""
        if self._chunks and not self._is_on:
            for chunk in self._chunks:
                chunk.enable_forward_pre_hook()
            self._is_on = True
