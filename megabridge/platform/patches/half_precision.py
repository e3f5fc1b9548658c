"""Float16Module that keeps the routers' buffers in fp32.

Replaces the cast of megatron/core/transformer/module.py:436-470, which casts every buffer. Correction biases differ by less than
the resolution of bf16 (DeepSeek-R1's are all near 8), and token counts stop growing at a few hundred in it. megatron-core casts a
bias back to fp32 at its first use, after the precision is lost. megatron-core 0.19.
"""

from __future__ import annotations

from typing import Any

import torch

from megabridge.platform import patches


def in_half_precision(config: Any, chunk: torch.nn.Module) -> torch.nn.Module:
    """Wraps the chunk in Float16Module, without casting its routers' buffers."""
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe.router import TopKRouter

    patches.check_megatron(__name__)
    kept = [
        (module, name, buffer)
        for module in chunk.modules()
        if isinstance(module, TopKRouter)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    wrapped: torch.nn.Module = Float16Module(config, chunk)
    for module, name, buffer in kept:
        setattr(module, name, buffer)
    return wrapped
