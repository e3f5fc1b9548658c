"""Dots1ForCausalLM: dots.llm1 (transformers models/dots1)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed, Json
from megabridge.families.core.moe import (
    DenseFirst,
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
    biases,
    embeddings,
    gated_mlp,
    pre_norms,
    qk_norms,
    rms,
    sizes,
)
from megabridge.families.core.ranges import COUNT
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block


def _is_windowed(hf: Json, layer: int) -> bool:
    return layer >= int(hf.get("max_window_layers", 62))


# fmt: off
FAMILY = Family(
    architecture="Dots1ForCausalLM",
    model_type="dots1",
    fields=(
        *sizes(kv=32),
        *rms(),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Fixed("qk_norm",                           "head"),
        *mixture(experts="n_routed_experts", aux=None, defaults=(None, None, 1408)),
        *sigmoid_router(normalize=False),
        DenseFirst(),
        SharedExperts(default=0, width=("moe_intermediate_size", 1408)),
        SlidingWindow(_is_windowed, default=4096, pattern_keys=("max_window_layers",), pattern=COUNT),
        Rope(),
        UNTIED,
        *routing_notes("sigmoid", "noaux_tc"),
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), qk_norms(), gated_mlp(), router(bias="mlp.gate.e_score_correction_bias"), experts(),
        shared_expert("mlp.shared_experts"),
    )),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "n_routed_experts": 8,
        "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "norm_topk_prob": False, "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 1.5, "tie_word_embeddings": False, "sliding_window": 12,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
