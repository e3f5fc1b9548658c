"""Windows and capped scores on CUDA, by torch's flex attention: scores stay out of memory, blocks outside a window are skipped."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def can_take(query: Tensor, *, dropout: float) -> bool:
    """Whether the kernel takes queries [b, heads, s, d] like these: on CUDA, at least 128, heads as wide as a power of two.

    For fewer queries torch (2.11) chooses its decoding kernel, which not all shapes compile for.
    """
    length, width = query.shape[-2:]
    return query.is_cuda and dropout == 0.0 and length >= 128 and width >= 16 and width & (width - 1) == 0


def attend(query: Tensor, key: Tensor, value: Tensor, *, window: int | None, softcap: float | None, scale: float) -> Tensor:
    """Causal attention of [b, heads, s, d] with keys and values [b, kv_heads, s, d]; a query sees its last `window` keys."""
    mask = _mask(query.shape[-2], window, query.device)
    capped = None if softcap is None else _capped(softcap)
    out: Tensor = _kernel()(
        query, key, value, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out


@functools.cache
def _kernel() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=8)
def _mask(length: int, window: int | None, device: torch.device) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < (length if window is None else window))

    return create_block_mask(sees, None, None, length, length, device=device)


@functools.lru_cache(maxsize=8)
def _capped(softcap: float) -> Any:
    """One function per value: the kernel is compiled for it."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
