"""Chunks of meta parameters that a micro-batch can pass through: nothing in them is left on a device, and experts get equal shares.

Stands for what megatron-core's modules make outside `torch.device("meta")`: `inv_freq` of rotary embeddings
(megatron/core/models/common/embeddings/rotary_pos_embedding.py), buffers, and the dispatcher of tokens
(megatron/core/transformer/moe/moe_layer.py:300-314), which looks at values. For chunks that are traced and thrown away.
megatron-core 0.19.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megabridge.platform import patches


def install(chunk: nn.Module, dispatcher: Callable[[Any], Any]) -> None:
    """`dispatcher(layer)` makes what stands for the token dispatcher of one MoELayer."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    patches.check_megatron(__name__)
    for module in chunk.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, Tensor):
            module.inv_freq = frequencies.to("meta")
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to("meta"))
        if isinstance(module, MoELayer):
            module.token_dispatcher = dispatcher(module)
