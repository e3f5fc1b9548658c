"""Small quantised models."""

from __future__ import annotations

from typing import Any

from megabridge.families.mixtral import FAMILY as MIXTRAL
from tests.support.models import TINY

CASES = "tests.support.quantised"


DEEPSEEK = "DeepseekV3ForCausalLM"


# 192 columns are one block of 128 and a half, cut into 96 by tp 2 and 64 by tp 3; rows are cut inside blocks too.
SHAPE: dict[str, Any] = {
    **TINY,
    "hidden_size": 192,
    "intermediate_size": 336,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 132,
    "max_position_embeddings": 252,  # tp 3 divides it
    "dtype": "bfloat16",
}


MIXTURE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", **MIXTRAL.tiny, "dtype": "bfloat16",
}  # fmt: skip
