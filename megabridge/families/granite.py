"""GraniteForCausalLM: Granite 3 and 4 dense (transformers models/granite/modeling_granite.py): four multipliers."""

from typing import Final

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Converted, Field
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    UNTIED,
    attention,
    biases,
    embeddings,
    gated_mlp,
    pre_norms,
    rms,
    sizes,
)
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FACTORS: Final = (
    Field("embedding_multiplier",                  "embedding_multiplier", 1.0),
    Field("residual_multiplier",                   "residual_multiplier",  1.0),
    Field("softmax_scale",                         "attention_multiplier", 1.0),
    Converted("logits_multiplier",                 "logits_scaling",       lambda value: 1 / value, lambda value: 1 / value, 1.0),
)
FAMILY = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    fields=(
        *sizes(),
        *rms(),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias", "mlp_bias"),
        *FACTORS,
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.03, "logits_scaling": 5.0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
