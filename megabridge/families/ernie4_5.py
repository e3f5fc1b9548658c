"""Ernie4_5ForCausalLM: ERNIE 4.5, dense (transformers models/ernie4_5/modeling_ernie4_5.py)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed, Repeats
from megabridge.families.core.parts import GATED_SILU, LAYER, TIED, attention, biases, embeddings, gated_mlp, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="Ernie4_5ForCausalLM",
    model_type="ernie4_5",
    fields=(
        *sizes(kv=2, head=128, positions=131072),
        *rms(1e-5),
        *GATED_SILU,
        *biases("use_bias", "use_bias", "use_bias"),
        Fixed("rotary_interleaved",                True),
        Rope(theta=5e5),
        TIED,
        Repeats("compression_ratio",               1.0),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "use_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
