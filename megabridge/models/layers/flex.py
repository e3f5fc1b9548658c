"""Windows, capped scores and sinks on CUDA with torch's flex attention: no stored scores, blocks outside a window are skipped."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


def can_take(query: Tensor, *, dropout: float) -> bool:
    """Whether the kernel takes these queries [b, heads, s, d]: on CUDA, no dropout, s at least 128, d a power of two from 16.

    For fewer queries torch (2.11) chooses its decoding kernel, which not all shapes compile for.
    """
    length, width = query.shape[-2:]
    return query.is_cuda and dropout == 0.0 and length >= 128 and width >= 16 and width & (width - 1) == 0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries [b, heads, s, d] with keys and values [b, kv_heads, s, d]; `mask` says which keys a query sees.

    `sinks` [heads] are extra scores in the softmax, with no value.
    """
    settings: dict[str, Any] = {
        "score_mod": None if softcap is None else _capped(softcap),
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if sinks is None:
        out: Tensor = _kernel()(query, key, value, **settings)
        return out
    out, aux = _kernel()(query, key, value, return_aux=AuxRequest(lse=True), **settings)
    share = torch.sigmoid(aux.lse - sinks.float()[:, None])  # of the softmax without the sink's part
    return out * share[..., None].to(out.dtype)


@functools.cache
def _kernel() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=8)
def causal_mask(length: int, window: int | None, device: torch.device, *, chunks: bool = False) -> BlockMask:
    """The mask of the keys not after a query: with a window its last `window` ones, or with `chunks` those in its own chunk of
    `window` positions."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if chunks and window is not None:
            return (query >= key) & (query // window == key // window)
        return (query >= key) & (query - key < (length if window is None else window))

    return create_block_mask(sees, None, None, length, length, device=device)


def document_mask(documents: Tensor, positions: Tensor, window: int | None, *, chunks: bool) -> BlockMask:
    """causal_mask within documents: `documents` [t] has the number of each token's document, `positions` [t] its place there."""
    length = documents.shape[0]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (query >= key) & (documents[query] == documents[key])
        if chunks and window is not None:
            return own & (positions[query] // window == positions[key] // window)
        return own & (query - key < (length if window is None else window))

    return create_block_mask(sees, None, None, length, length, device=documents.device)


@functools.lru_cache(maxsize=8)
def _capped(softcap: float) -> Any:
    """Returns the same function for the same value, since the kernel is compiled for it."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
