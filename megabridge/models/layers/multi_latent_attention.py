"""Multi-latent attention (MLA) of megatron-core, with our norms and core attention and Hugging Face's rotary settings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, override

import torch
from torch import Tensor

from megabridge.models.layers.rotary import HFRotaryEmbedding
from megabridge.platform.patches import rotary_factors

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


class MultiLatentAttention(MLASelfAttention):  # type: ignore[misc]
    """MLA with the gradient of the rotary key summed over the tp ranks, since every rank's heads read that one key. megatron-core
    takes a rank's own part where the down-projection is sharded."""

    @override
    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: vars(submodules)[name] for name in names}

    @override
    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (queries [.., q_lora_rank] or hidden states, latent and rotary key [.., kv_lora_rank + qk_pos_emb_head_dim])."""
        queries, latent = super()._qkv_down_projection(hidden_states)
        config = self.config
        if latent.shape[-1] == config.kv_lora_rank + config.qk_pos_emb_head_dim:
            return queries, latent
        latent = gather_from_tensor_model_parallel_region(latent)
        if config.sequence_parallel:  # megatron-core gathers the rotary key of all tokens again, and sums its gradients
            return queries, scatter_to_sequence_parallel_region(latent)
        latent, key = latent.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        return queries, torch.cat([latent, copy_to_tensor_model_parallel_region(key)], dim=-1)


def mla_spec(backend: Any, config: Any) -> Any:
    """Returns the spec of multi-latent attention for the `torch` backend, from its TorchModules.

    megatron-core recognises the down-projections by their class, so they are its own ColumnParallelLinear: sharded over tp by rows,
    with gathered outputs.
    """
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
    norm = functools.partial(_with_epsilon, norm, backend.options.qk_norm_epsilon) if config.qk_layernorm else IdentityOp
    core = backend.core_attention()
    return ModuleSpec(
        module=MultiLatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=ModuleSpec(module=core.func, params=core.keywords),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm if config.q_lora_rank is not None else IdentityOp,
            kv_layernorm=norm,
        ),
    )


def _with_epsilon(norm: Any, epsilon: float | None, *, eps: float, **settings: Any) -> Any:
    return norm(eps=eps if epsilon is None else epsilon, **settings)


def rotary_scale(rope: Mapping[str, Any]) -> tuple[float, float]:
    """Returns (rotary_scaling_factor, mscale_all_dim) of TransformerConfig, from which megatron-core computes the softmax scale."""
    if rope.get("rope_type", "default") == "default" or not rope.get("mscale_all_dim"):
        return 1.0, 0.0
    return float(rope["factor"]), float(rope["mscale_all_dim"])


class MLARotaryEmbedding(HFRotaryEmbedding):
    """HFRotaryEmbedding in the form that MLA takes under rope_type=yarn: it returns the attention factor with the angles."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:  # type: ignore[override]
        """Returns (angles [max_seq_len, 1, 1, qk_pos_emb_head_dim], attention factor)."""
        return super().forward(*args, **kwargs), self.attention_factor


def set_rope(attention: Any, rope: Mapping[str, Any]) -> None:
    """Sets the rotary embedding of one layer's attention from a Hugging Face `rope_parameters` dict."""
    config = attention.config
    embedding = MLARotaryEmbedding(
        rope, kv_channels=config.qk_pos_emb_head_dim, rotary_percent=1.0, interleaved=False, cp_group=attention.pg_collection.cp
    )
    rotary_factors.set_embedding(attention, embedding)
