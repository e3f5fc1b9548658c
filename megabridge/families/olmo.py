"""Olmo2ForCausalLM: OLMo 2; Olmo3ForCausalLM: Olmo 3 (transformers models/olmo2, olmo3): norms after attention and MLP only."""

from dataclasses import replace

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    UNTIED,
    attention,
    biases,
    embeddings,
    gated_mlp,
    post_norms,
    qk_norms,
    rms,
    sizes,
)
from megabridge.families.core.rope_and_windows import LayerRopes, Rope, SlidingWindow, every
from megabridge.mapping import WeightMap, block

# fmt: off
SHARED = (
    *sizes(),
    *rms(1e-5),
    *GATED_SILU,
    *biases("attention_bias", "attention_bias"),
    Fixed("pre_norm",                              False),
    Fixed("post_norm",                             True),
    Fixed("qk_norm",                               "whole"),
    UNTIED,
)
OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    fields=(*SHARED, Rope()),
    weights=WeightMap(embeddings(), block(*LAYER, post_norms(), attention(), qk_norms(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
OLMO3 = replace(
    OLMO2,
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    fields=(*SHARED, SlidingWindow(every(4), default=4096), LayerRopes(theta=(5e5, 5e5))),
    tiny={**OLMO2.tiny, "sliding_window": 12,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
          "rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0,
                                                 "original_max_position_embeddings": 32},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}},
)
FAMILIES = (OLMO2, OLMO3)
