"""GlmForCausalLM: GLM-4 of 2024; Glm4ForCausalLM: GLM-4-0414, GLM-Z1 (transformers models/glm, glm4).

Half of each head is rotated, in pairs of neighbouring channels.
"""

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
    plain_mlp,
    post_norms,
    pre_norms,
    rms,
    sizes,
)
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
SHARED = (
    *sizes(kv=2, head=128, positions=131072),
    *rms(1.5625e-7),
    *GATED_SILU,
    *biases("attention_bias", None, default=True),
    Fixed("rotary_interleaved",                    True),
    Rope(partial=0.5),
    UNTIED,
)
GLM = Family(
    architecture="GlmForCausalLM",
    model_type="glm",
    fields=SHARED,
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), plain_mlp("mlp.gate_up_proj"))),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
)
GLM4 = replace(
    GLM,
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    fields=(*SHARED, Fixed("post_norm", True)),
    weights=WeightMap(
        embeddings(),
        block(*LAYER, pre_norms(), post_norms("post_self_attn_layernorm", "post_mlp_layernorm"), attention(),
              plain_mlp("mlp.gate_up_proj")),
    ),
)
FAMILIES = (GLM, GLM4)
