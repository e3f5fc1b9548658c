"""Qwen2MoeForCausalLM: Qwen1.5-MoE, Qwen2-57B-A14B (transformers models/qwen2_moe).

Qwen3MoeForCausalLM: Qwen3-30B-A3B, Qwen3-235B-A22B (transformers models/qwen3_moe).
"""

from dataclasses import replace

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Alias, Field, Fixed, Json, Repeats, Unread
from megabridge.families.core.moe import SOFTMAX, SparseStep, experts, mixture, router, shared_expert
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
    return layer % 2 == 0 and layer < int(hf.get("max_window_layers", 28))


# fmt: off
QWEN2 = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    fields=(
        *sizes(kv=16, positions=32768),
        *rms(),
        *GATED_SILU,
        *biases("qkv_bias", None, default=True),
        *mixture(defaults=(60, 4, 1408)),
        *SOFTMAX,
        SparseStep(),
        Field("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", 5632),
        Fixed("moe_shared_expert_gate",            True),
        SlidingWindow(_is_windowed, default=4096, switch="use_sliding_window", pattern_keys=("max_window_layers",),
                pattern=COUNT),
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), gated_mlp(), router(), experts(), shared_expert(gate="mlp.shared_expert_gate"),
    )),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 131,
        "max_position_embeddings": 256, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "sliding_window": 12, "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
QWEN3 = replace(
    QWEN2,
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    fields=(
        *sizes(kv=4, positions=32768),
        *rms(),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Fixed("qk_norm",                           "head"),
        # The second is the attribute's name in transformers, and so in the files that it writes.
        Alias(Field("num_moe_experts",            "num_experts", 128), "num_local_experts"),
        *mixture(defaults=(128, 8, 768))[1:],
        *SOFTMAX,
        SparseStep(),
        SlidingWindow(default=4096, switch="use_sliding_window"),
        Rope(),
        UNTIED,
        Unread("max_window_layers"),
        Repeats("use_qk_norm",                     True),
        Repeats("qkv_bias",                        False),
        Repeats("shared_expert_intermediate_size", 0),
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), qk_norms(), gated_mlp(), router(), experts(),
    )),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256,
        "attention_bias": True, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "decoder_sparse_step": 2,
        "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
FAMILIES = (QWEN2, QWEN3)
