"""Converts the all-to-all splits of experts' tokens to host integers, on a CPU.

Replaces `maybe_move_tensor_to_cpu` of megatron/core/transformer/moe/moe_utils.py:1169 where token_dispatcher.py:927 calls it: it
converts splits only from a CUDA device. megatron-core 0.19.
"""

from __future__ import annotations

from typing import Any

import torch

from megabridge.platform import patches


def _host_splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def install() -> None:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    patches.check_megatron(__name__)
    token_dispatcher.maybe_move_tensor_to_cpu = _host_splits
