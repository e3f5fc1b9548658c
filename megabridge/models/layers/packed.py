"""Packed sequences: several documents in one row, which don't attend to each other.

megatron-core takes them as one long sequence with a micro-batch size of 1 (`thd`) and the bounds of the documents. The bounds stay
on the host: code that reads them there (rotary embedding, attention by document) never waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import megabridge.platform as platform
from megabridge.errors import ConfigError
from megabridge.models.layers import flex

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention


@dataclass
class Packed(PackedSeqParams):  # type: ignore[misc]
    """megatron-core's PackedSeqParams for the tokens 0 to bounds[-1], with the fields that the `torch` backend needs."""

    bounds: tuple[int, ...] = ()
    """Indices at which documents begin, and the end of the last one."""
    positions: Tensor | None = None
    """[t] int64 on the device: each token's position in its document."""
    masks: dict[tuple[int | None, bool], BlockMask] = field(default_factory=dict)
    """Masks by (window, chunks), made once for all layers."""

    def mask(self, window: int | None, *, chunks: bool) -> BlockMask:
        """The mask for flex attention: a token sees those of its document that are not after it, within `window`."""
        if (window, chunks) not in self.masks:
            assert self.positions is not None
            documents = _numbers(self.bounds, self.positions.device)
            self.masks[window, chunks] = flex.document_mask(documents, self.positions, window, chunks=chunks)
        return self.masks[window, chunks]

    def on_device(self) -> PackedSeqParams:
        """Returns the same with the bounds on the device, for Transformer Engine's attention."""
        places = self.cu_seqlens_q.to(platform.device())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=places,
            cu_seqlens_kv=places,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_kv=self.max_seqlen_kv,
        )


def packed(documents: Tensor, positions: Tensor) -> Packed:
    """Builds a Packed from a micro-batch's `documents` [b, s] on the CPU and `positions` [b, s] on the device; rows are joined."""
    bounds = document_bounds(documents)
    longest = max(end - begin for begin, end in itertools.pairwise(bounds))
    places = torch.tensor(bounds, dtype=torch.int32)
    return Packed(
        qkv_format="thd",
        cu_seqlens_q=places,
        cu_seqlens_kv=places,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
        positions=positions.flatten(),
    )


def document_bounds(documents: Tensor) -> tuple[int, ...]:
    """Indices at which documents begin in the concatenated rows of [b, s], and b * s. Every row begins a document."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return (*begins.flatten().nonzero().flatten().tolist(), documents.numel())


def for_attention(params: Packed, cores: Sequence[Any], own: type) -> PackedSeqParams:
    """Returns `params` in the form that a chunk's core attentions take, unchanged where all are of class `own`.

    Raises ConfigError for megatron-core's DotProductAttention, which has no packed sequences.
    """
    if all(isinstance(core, own) for core in cores):
        return params
    if any(isinstance(core, DotProductAttention) for core in cores):
        raise ConfigError("backend=local has no packed sequences; set data.packing=false, or backend=torch or te.")
    return params.on_device()


def _numbers(bounds: Sequence[int], device: torch.device) -> Tensor:
    """The number of each token's document, [t] int32."""
    numbers = torch.zeros(bounds[-1], dtype=torch.int32)
    numbers[list(bounds[1:-1])] = 1
    return numbers.cumsum(0, dtype=torch.int32).to(device)
