"""StableLmForCausalLM: StableLM 2 and 3B (transformers models/stablelm/modeling_stablelm.py)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Field, Fixed
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, embeddings, gated_mlp, pre_norms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import PerRow, WeightMap, block, weight

# fmt: off
FAMILY = Family(
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    fields=(
        *sizes(kv=32, positions=4096),
        *GATED_SILU,
        Fixed("normalization",                     "LayerNorm"),
        Field("layernorm_epsilon",                 "layer_norm_eps",      1e-5),
        Field("add_qkv_bias",                      "use_qkv_bias",        False),
        Choice("qk_norm",                          "qk_layernorm",        ((False, None), (True, "heads"))),
        Choice("parallel_residual",                "use_parallel_residual", ((False, None), (True, "shared"))),
        Rope(partial=0.25),
        UNTIED,
    ),
    weights=WeightMap(
        embeddings(),
        block(*LAYER, pre_norms(), attention(), gated_mlp(),
              weight("self_attention.q_layernorm.weight", "self_attn.q_layernorm.norms.{row}.weight",
                     layout=PerRow("num_attention_heads")),
              weight("self_attention.k_layernorm.weight", "self_attn.k_layernorm.norms.{row}.weight",
                     layout=PerRow("num_query_groups"))),
    ),
    tiny={
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "use_qkv_bias": True, "qk_layernorm": True,
        "use_parallel_residual": True, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
)
