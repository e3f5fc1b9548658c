"""GPTNeoXForCausalLM: Pythia, GPT-NeoX-20B (transformers models/gpt_neox/modeling_gpt_neox.py)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Derived, Field, Fixed
from megabridge.families.core.parts import UNTIED, body_sizes, embeddings, head_dim, joined_attention, plain_mlp, pre_norms
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import Same, WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    fields=(
        *body_sizes()[:4],
        Derived("num_query_groups",                lambda hf: hf["num_attention_heads"]),
        Derived("kv_channels",                     head_dim),
        *body_sizes()[5:],
        Fixed("normalization",                     "LayerNorm"),
        Field("layernorm_epsilon",                 "layer_norm_eps",      1e-5),
        Choice("activation_func",                  "hidden_act",          (("gelu", "gelu"), ("gelu_new", "gelu_new"))),
        Fixed("gated_linear_unit",                 False),
        Field("add_qkv_bias",                      "attention_bias",      True),
        Field("add_attn_proj_bias",                "attention_bias",      True),
        Fixed("add_mlp_bias",                      True),
        Choice("parallel_residual",                "use_parallel_residual", ((True, "separate"), (False, None))),
        Rope(partial=0.25, others={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}),
        UNTIED,
    ),
    weights=WeightMap(
        embeddings("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        block("decoder.layers.{layer}", "gpt_neox.layers.{layer}", pre_norms(),
              joined_attention("attention.query_key_value", "attention.dense", Same()),
              plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    ),
    ignored=("gpt_neox.layers.*.attention.bias", "gpt_neox.layers.*.attention.masked_bias",
             "gpt_neox.layers.*.attention.rotary_emb.inv_freq"),
    tiny={
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 131,
        "max_position_embeddings": 256, "use_parallel_residual": True, "tie_word_embeddings": False, "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
)
