"""DeepseekV2ForCausalLM: DeepSeek V2, V2-Lite; DeepseekV3ForCausalLM: V3, V3.1, R1 (transformers models/deepseek_v2, deepseek_v3).

Kimi K2 is V3 with the class name KimiK2ForCausalLM, which transformers lacks: change it to DeepseekV3ForCausalLM in config.json.
"""

from __future__ import annotations

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Field, FieldLike, Fixed, RequiredValue
from megabridge.families.core.mla import mla_attention, mla_sizes
from megabridge.families.core.moe import (
    MTP_COPIES,
    MTP_NAMES,
    DenseFirst,
    Groups,
    MtpLayers,
    SharedExperts,
    experts,
    mixture,
    mtp_layers,
    router,
    routing_notes,
    shared_expert,
    sigmoid_router,
)
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, embeddings, gated_mlp, pre_norms
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block
from megabridge.mapping.rules import Rules


def _layer(gate: Rules) -> Rules:
    return (*pre_norms(), *mla_attention(), *gated_mlp(), *gate, *experts(), *shared_expert("mlp.shared_experts"))


# fmt: off
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 131, "max_position_embeddings": 256, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
                        "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1},
}
SHARED: tuple[FieldLike, ...] = (*GATED_SILU, Rope(), UNTIED)
V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    fields=(
        *mla_sizes(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128, positions=2048),
        *mixture(experts="n_routed_experts", aux=None, defaults=(64, None, 1407)),
        Fixed("moe_router_score_function",         "softmax"),
        Fixed("moe_router_pre_softmax",            True),
        Groups(method="topk_method", score="max"),
        Field("moe_router_topk_scaling_factor",    "routed_scaling_factor", 1.0),
        DenseFirst(),
        SharedExperts(default=2, width=("moe_intermediate_size", 1407)),
        RequiredValue("norm_topk_prob",                     (False,)),
        RequiredValue("mlp_bias",                           (False,)),
        *routing_notes("softmax"),
        *SHARED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, _layer(router()))),
    tiny={**TINY, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
)
V3_LAYER = _layer(router(bias="mlp.gate.e_score_correction_bias"))
V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    fields=(
        *mla_sizes(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128, positions=4096, heads=128),
        *mixture(experts="n_routed_experts", aux=None, defaults=(256, 8, 2048)),
        *sigmoid_router(groups=(8, 4), topk=8, scale=2.5),
        DenseFirst(default=3),
        MtpLayers(default=1),
        SharedExperts(width=("moe_intermediate_size", 2048)),
        RequiredValue("rope_interleave",                    (True,)),
        *routing_notes("sigmoid", "noaux_tc"),
        *SHARED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, V3_LAYER), mtp_layers(V3_LAYER), copies=MTP_COPIES),
    passthrough=MTP_NAMES,
    tiny={**TINY, "num_experts_per_tok": 4, "num_nextn_predict_layers": 1},
)
FAMILIES = (V2, V3)
