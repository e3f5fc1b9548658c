"""CohereForCausalLM: Command R and R+, Aya; Cohere2ForCausalLM: Command R7B and A (transformers models/cohere, cohere2).

Attention and MLP are parallel.
"""

from dataclasses import replace

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Field, Fixed, Repeats, Unread, given
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    TIED,
    attention,
    biases,
    embeddings,
    gated_mlp,
    pre_norms,
    qk_norms,
    sizes,
)
from megabridge.families.core.ranges import STEP
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow, every
from megabridge.mapping import WeightMap, block

# fmt: off
SHARED = (
    *sizes(positions=8192),
    *GATED_SILU,
    Fixed("normalization",                         "LayerNorm"),
    Fixed("norm_bias",                             False),
    Field("layernorm_epsilon",                     "layer_norm_eps",      1e-5),
    Fixed("parallel_residual",                     "shared"),
    Fixed("rotary_interleaved",                    True),
    Field("logits_multiplier",                     "logit_scale",         0.0625),
    *biases("attention_bias", "attention_bias"),
    TIED,
)
COHERE = Family(
    architecture="CohereForCausalLM",
    model_type="cohere",
    fields=(*SHARED, Choice("qk_norm", "use_qk_norm", ((False, None), (True, "heads"))), Rope(theta=5e5)),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), qk_norms(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "logit_scale": 0.25, "use_qk_norm": True, "attention_bias": True,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
COHERE2 = replace(
    COHERE,
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    fields=(
        *SHARED,
        SlidingWindow(every("sliding_window_pattern", 4), default=4096, nope_elsewhere="always",
                pattern_keys=("sliding_window_pattern",), pattern=STEP),
        Rope(),
        Repeats("layer_switch",                    lambda hf: given(hf, "sliding_window_pattern", 4)),
        Repeats("order_of_interleaved_layers",     "local_attn_first"),
        Repeats("position_embedding_type",         "rope_gptj"),
        Repeats("rotary_pct",                      1.0),
        *(Repeats(f"use_{name}", True) for name in ("embedding_sharing", "gated_activation", "parallel_block")),
        Unread("use_parallel_embedding"),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    tiny={**{k: v for k, v in COHERE.tiny.items() if k != "use_qk_norm"}, "sliding_window": 12, "head_dim": 8,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
)
FAMILIES = (COHERE, COHERE2)
