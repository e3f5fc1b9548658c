"""Makes meta-device chunks runnable: moves all their tensors to the meta device, and replaces the token dispatcher.

Replaces what megatron-core's modules create outside `torch.device("meta")`: `inv_freq` of rotary embeddings
(megatron/core/models/common/embeddings/rotary_pos_embedding.py), buffers, and the token dispatcher
(megatron/core/transformer/moe/moe_layer.py:300-314), which reads values. For chunks that are traced and discarded.
megatron-core 0.19.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megabridge.platform import patches


def install(chunk: nn.Module, dispatcher: Callable[[Any], Any]) -> None:
    """Patches `chunk`; `dispatcher(layer)` makes the replacement of the token dispatcher of one MoELayer."""
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
