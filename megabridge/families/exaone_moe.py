"""ExaoneMoeForCausalLM: K-EXAONE (transformers models/exaone_moe): layers without a window have no rotary embedding."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed, Repeats
from megabridge.families.core.moe import (
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
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    UNTIED,
    attention,
    embeddings,
    gated_mlp,
    pre_norms,
    qk_norms,
    rms,
    sizes,
)
from megabridge.families.core.rope_and_windows import Rope
from megabridge.families.exaone4 import WINDOWS
from megabridge.mapping import WeightMap, block

DENSE = LayerTypes(dense_first=1, count="first_k_dense_replace")
# fmt: off
FAMILY = Family(
    architecture="ExaoneMoeForCausalLM",
    model_type="exaone_moe",
    fields=(
        *sizes(kv=32),
        *rms(1e-5),
        *GATED_SILU,
        Fixed("qk_norm",                           "head"),
        *mixture(aux=None, defaults=(64, 8, 1024)),
        *sigmoid_router(scale=2.5),
        DENSE,
        MtpLayers(),
        SharedExperts("num_shared_experts", width=("moe_intermediate_size", 1024)),
        WINDOWS,
        Rope(),
        UNTIED,
        *routing_notes("sigmoid", "noaux_tc"),
        Repeats("is_moe_layer",                    lambda hf: [bool(mixed) for mixed in DENSE.read(hf)["moe_layer_freq"]]),
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), qk_norms(), gated_mlp(), router(bias="mlp.e_score_correction_bias"), experts(),
        shared_expert("mlp.shared_experts"),
    )),
    passthrough=("mtp.*",),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 131, "max_position_embeddings": 256, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts": 8, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "norm_topk_prob": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
