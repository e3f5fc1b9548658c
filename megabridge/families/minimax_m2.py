"""MiniMaxM2ForCausalLM: MiniMax-M2, M2.1 (transformers models/minimax_m2): norms of queries and keys over all heads."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed, Repeats, RequiredValue, Unread
from megabridge.families.core.moe import MTP_NAMES, MtpLayers, experts, mixture, router
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, embeddings, pre_norms, qk_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    fields=(
        *sizes(kv=8, head=128, positions=196608),
        *rms(),
        *GATED_SILU,
        Fixed("qk_norm",                           "whole"),
        RequiredValue("use_qk_norm",                        (True,)),
        *mixture(experts="num_local_experts", width="intermediate_size", defaults=(256, 8, 1536)),
        Fixed("moe_router_score_function",         "sigmoid"),
        Fixed("moe_router_enable_expert_bias",     True),
        RequiredValue("scoring_func",                       ("sigmoid",)),
        RequiredValue("use_routing_bias",                   (True,)),
        RequiredValue("shared_intermediate_size",           (0,)),
        MtpLayers("num_mtp_modules"),
        Rope(5e6, partial=1.0, channels="rotary_dim"),
        UNTIED,
        Repeats("attn_type_list",                  lambda hf: [1] * hf["num_hidden_layers"]),  # 0: linear
        Repeats("qk_norm_type",                    "per_layer"),
        *(Repeats(f"layernorm_{name}_beta", 1.0) for name in ("full_attention", "linear_attention", "mlp")),
        Unread("mtp_transformer_layers", "mlp_intermediate_size", "shared_moe_mode"),
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), qk_norms(),
        router("block_sparse_moe.gate", bias="block_sparse_moe.e_score_correction_bias"),
        experts(*(f"block_sparse_moe.experts.{{expert}}.{name}" for name in ("w1", "w3", "w2"))),
    )),
    passthrough=MTP_NAMES,
    tiny={
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "num_local_experts": 8, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
)
