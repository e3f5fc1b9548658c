"""Types and ranges of native settings, for all keys of config.json that they are read from.

Bounds are far from anything published, but small enough that nothing runs for hours or overflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from megabridge.config.value_types import FLAG, LAYERS, SCALAR, SIZE, Kind, number, whole

COUNT: Final = whole(0, 16384)
"""Number of layers, groups or experts, which may be 0."""
STEP: Final = whole(1, 16384)
POSITIONS: Final = whole(1, 2**31 - 1)
EPSILON: Final = number(0, 1)
SHARE: Final = number(1e-3, 1)
POSITIVE: Final = number(1e-9, 1e9)
FACTOR: Final = number(-1e9, 1e9)

RANGES: Final[Mapping[str, Kind]] = {
    "num_layers": LAYERS,
    **dict.fromkeys(
        (
            "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size",
            "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
            "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
        ),
        SIZE,
    ),
    "seq_length": POSITIONS,
    **dict.fromkeys(("init_method_std", "layernorm_epsilon", "qk_norm_epsilon", "router_epsilon", "router_jitter"), EPSILON),
    "rotary_percent": SHARE,
    "moe_aux_loss_coeff": number(0, 1e9),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_multiplier", "moe_router_topk_scaling_factor"), FACTOR,
    ),
    **dict.fromkeys(("softmax_scale", "attention_softcap", "logits_softcap", "activation_func_clamp_value"), POSITIVE),
    **dict.fromkeys(
        ("add_qkv_bias", "add_attn_proj_bias", "add_mlp_bias", "output_bias", "share_embeddings_and_output_weights"), FLAG,
    ),
    **dict.fromkeys(("hf_mtp_layers", "moe_router_num_groups", "moe_router_group_topk"), COUNT),
}  # fmt: skip


def range_of(native: str) -> Kind:
    """Returns the allowed values of the setting `native`; any scalar for one that isn't listed."""
    return RANGES.get(native, SCALAR)
