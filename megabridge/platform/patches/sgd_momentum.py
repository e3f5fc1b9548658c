"""Creates the state of torch's SGD before its first step, so that a checkpoint can be loaded.

Replaces the `init_state_fn` that megatron/core/optimizer/__init__.py:618-624 leaves at None for SGD, and calls before a
checkpoint is read. megatron-core 0.19.
"""

from __future__ import annotations

from typing import Any

import torch

from megabridge.platform import patches


def install(part: Any) -> None:
    """Patches one of megatron-core's optimizers around torch.optim.SGD."""
    patches.check_megatron(__name__)
    part.init_state_fn = _zero_momentum


def _zero_momentum(inner: torch.optim.SGD, _: Any = None) -> None:
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
