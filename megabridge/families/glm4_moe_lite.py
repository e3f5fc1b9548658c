"""Glm4MoeLiteForCausalLM: GLM 4.7 Flash (transformers models/glm4_moe_lite)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Repeats, RequiredValue
from megabridge.families.core.mla import mla_attention, mla_sizes
from megabridge.families.core.moe import (
    MTP_NAMES,
    LayerTypes,
    MtpLayers,
    SharedExperts,
    experts,
    mixture,
    router,
    routing_notes,
    shared_expert,
    sigmoid_router,
)
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, embeddings, gated_mlp, pre_norms
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="Glm4MoeLiteForCausalLM",
    model_type="glm4_moe_lite",
    fields=(
        *mla_sizes(q_rank=768, kv_rank=512, nope=192, rope=64, value=256, positions=202752, heads=20, eps=1e-5),
        *mixture(experts="n_routed_experts", aux=None, defaults=(64, 4, 1536)),
        *sigmoid_router(scale=1.8),
        LayerTypes(dense_first=1),
        MtpLayers(),
        SharedExperts(width=("moe_intermediate_size", 1536)),
        RequiredValue("rope_interleave",                    (True,)),
        *GATED_SILU,
        Rope(),
        UNTIED,
        *routing_notes("sigmoid", "noaux_tc"),
        Repeats("first_k_dense_replace",           1),
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), mla_attention(), gated_mlp(), router(bias="mlp.gate.e_score_correction_bias"), experts(),
        shared_expert("mlp.shared_experts"),
    )),
    passthrough=MTP_NAMES,
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 131, "max_position_embeddings": 256, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
