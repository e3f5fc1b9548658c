"""Multi-latent attention: megatron-core's, with our norms and core attention and Hugging Face's rotary settings."""

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
    """Every rank's heads read the one rotary key, so that its gradient is the sum over the tp ranks; megatron-core takes a rank's
    own where the down-projection is cut over them."""

    @override
    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: vars(submodules)[name] for name in names}

    @override
    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [.., q_lora_rank] or hidden states, latent and rotary key [.., kv_lora_rank + qk_pos_emb_head_dim])."""
        queries, latent = super()._qkv_down_projection(hidden_states)
        config = self.config
        if latent.shape[-1] == config.kv_lora_rank + config.qk_pos_emb_head_dim:
            return queries, latent
        latent = gather_from_tensor_model_parallel_region(latent)
        if config.sequence_parallel:  # megatron-core gathers the rotary key of all tokens again, and adds up its gradients
            return queries, scatter_to_sequence_parallel_region(latent)
        latent, key = latent.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        return queries, torch.cat([latent, copy_to_tensor_model_parallel_region(key)], dim=-1)


def mla_spec(backend: Any, config: Any) -> Any:
    """The spec of multi-latent attention of the `torch` backend, a TorchSpecProvider.

    megatron-core tells the down-projections by their class, so that they are its own ColumnParallelLinear: cut over tp by rows and
    gathered after.
    """
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
    norm = functools.partial(_with_epsilon, norm, backend.style.qk_norm_epsilon) if config.qk_layernorm else IdentityOp
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
    """(rotary_scaling_factor, mscale_all_dim) of TransformerConfig, by which megatron-core sharpens the softmax."""
    if rope.get("rope_type", "default") == "default" or not rope.get("mscale_all_dim"):
        return 1.0, 0.0
    return float(rope["factor"]), float(rope["mscale_all_dim"])


class MLARotaryEmbedding(HFRotaryEmbedding):
    """What multi-latent attention asks for under rope_type yarn: the angles, and what cosine and sine are multiplied by."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:  # type: ignore[override]
        """(angles [max_seq_len, 1, 1, qk_pos_emb_head_dim], attention factor)."""
        return super().forward(*args, **kwargs), self.attention_factor


def set_rope(attention: Any, rope: Mapping[str, Any]) -> None:
    """Gives one layer's attention the rotary settings of a Hugging Face `rope_parameters` dict."""
    config = attention.config
    embedding = MLARotaryEmbedding(
        rope, kv_channels=config.qk_pos_emb_head_dim, rotary_percent=1.0, interleaved=False, cp_group=attention.pg_collection.cp
    )
    rotary_factors.set_embedding(attention, embedding)
