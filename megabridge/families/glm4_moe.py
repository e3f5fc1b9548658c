"""Glm4MoeForCausalLM: GLM-4.5, 4.5-Air, 4.6, 4.7 (transformers models/glm4_moe): half of each head is rotated."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice
from megabridge.families.core.moe import (
    MTP_COPIES,
    MTP_NAMES,
    DenseFirst,
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
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    UNTIED,
    attention,
    biases,
    embeddings,
    gated_mlp,
    pre_norms,
    qk_norms,
    rms,
    sizes,
)
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
RULES = (
    *pre_norms(), *attention(), *qk_norms(), *gated_mlp(), *router(bias="mlp.gate.e_score_correction_bias"), *experts(),
    *shared_expert("mlp.shared_experts"),
)
FAMILY = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    fields=(
        *sizes(kv=8, positions=131072),
        *rms(1e-5),
        *GATED_SILU,
        *biases("attention_bias", None),
        Choice("qk_norm",                          "use_qk_norm", ((False, None), (True, "head"))),
        *mixture(experts="n_routed_experts", aux=None, defaults=(128, 8, 1408)),
        *sigmoid_router(),
        DenseFirst(default=1),
        MtpLayers(default=1),
        SharedExperts(width=("moe_intermediate_size", 1408)),
        Rope(partial=0.5),
        UNTIED,
        *routing_notes("sigmoid", "noaux_tc"),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, RULES), mtp_layers(RULES), copies=MTP_COPIES),
    passthrough=MTP_NAMES,
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True,
        "use_qk_norm": True, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
)
