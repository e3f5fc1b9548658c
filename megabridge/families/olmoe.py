"""OlmoeForCausalLM: OLMoE (transformers models/olmoe): norms of queries and keys over all heads. Its clip_qkv is refused."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed, RequiredValue
from megabridge.families.core.moe import SOFTMAX, experts, mixture, router
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, biases, embeddings, pre_norms, qk_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    fields=(
        *sizes(positions=4096),
        *rms(1e-5),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Fixed("qk_norm",                           "whole"),
        *mixture(width="intermediate_size", aux=0.01, defaults=(64, 8, 2048)),
        *SOFTMAX,
        Rope(),
        UNTIED,
        RequiredValue("clip_qkv",                           (None,)),
        RequiredValue("sliding_window",                     (None,)),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), qk_norms(), router(), experts())),
    tiny={
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "num_experts": 8, "num_experts_per_tok": 3,
        "norm_topk_prob": False, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
