"""SeedOssForCausalLM: Seed-OSS (transformers models/seed_oss/modeling_seed_oss.py)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Field
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, embeddings, gated_mlp, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    fields=(
        *sizes(kv=8, head=128, positions=524288),
        *rms(),
        *GATED_SILU,
        Field("add_qkv_bias",                      "attention_bias",      True),
        Field("add_attn_proj_bias",                "attention_out_bias",  False),
        Field("add_mlp_bias",                      "mlp_bias",            False),
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "attention_out_bias": True,
        "mlp_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
