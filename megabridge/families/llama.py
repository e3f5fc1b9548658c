"""LlamaForCausalLM: Llama 2 and 3, SmolLM2, Yi, TinyLlama (transformers models/llama/modeling_llama.py)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Repeats
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
FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    fields=(
        *sizes(),
        *rms(),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias", "mlp_bias"),
        Rope(),
        UNTIED,
        Repeats("rope_interleaved",                False),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
)
