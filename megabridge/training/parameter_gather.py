"""Switches the parameter gather of optimizer.overlap_param_gather on for training steps, and off for everything else.

DDP's hooks gather updated parameters during the next forward pass. Validation, saves and callbacks need them complete before, so
the hooks are on during training steps only, as in megatron/training/training.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ParameterGather:
    """The hooks of all chunks. Every rank calls `pause` and `resume` at the same steps; repeated calls do nothing."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
        self._is_on = bool(self._chunks)
        self.pause(sync=False)  # the initial parameters are complete on every rank

    def pause(self, *, sync: bool = True) -> None:
        """Gathers the parameters (not with sync=False, where they are overwritten next) and turns the hooks off."""
        if self._is_on:
            for chunk in self._chunks:
                chunk.disable_forward_pre_hook(param_sync=sync)
            self._is_on = False

    def resume(self) -> None:
        """Turns the hooks on: forward passes gather the parameters."""
        if self._chunks and not self._is_on:
            for chunk in self._chunks:
                chunk.enable_forward_pre_hook()
            self._is_on = True
