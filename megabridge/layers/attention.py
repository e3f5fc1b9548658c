"""Core attention by torch's scaled_dot_product_attention: O(s) memory, grouped queries, any device."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megabridge.errors import ConfigError

from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType


class TorchAttention(torch.nn.Module):
    """What megatron-core's Attention calls `core_attention`; its arguments are CoreAttentionBuilder's.

    Under multi-latent attention the key and the value heads have widths of their own, `k_channels` and `v_channels`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.attn_mask_type = attn_mask_type
        self.sequence_parallel = config.sequence_parallel
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1 / math.sqrt(k_channels or config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv_heads, d] of this rank, to [s, b, heads * d].

        `attention_mask` is boolean, True where attention is not allowed, as in megatron-core: None with a causal mask
        type means causal; [b, 1, 1, s] masks keys (padding), and stays causal; [b, 1, s, s] is the whole mask. A query
        that may attend to nothing gives zeros.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ConfigError("backend=torch has no packed sequences and no attention bias; use padded batches or backend=te.")
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        allowed = None
        if attention_mask is not None:
            allowed = ~attention_mask
            if causal and allowed.shape[-2] == 1:
                positions = torch.arange(key.shape[0], device=key.device)
                allowed = allowed & (positions[None, :] <= positions[:, None])
        dropout = self.dropout if self.training else 0.0
        # Heads are cut over tp, so that each rank drops its own; under sequence parallelism megatron-core uses the
        # default generator here (dot_product_attention.py).
        forked = dropout > 0 and not self.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forked else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=causal and allowed is None,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).flatten(2)
