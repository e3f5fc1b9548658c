"""Phi3ForCausalLM: Phi-3, Phi-3.5 and Phi-4 (transformers models/phi3/modeling_phi3.py)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Repeats
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, embeddings, joined_attention, plain_mlp, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    fields=(
        *sizes(positions=4096),
        *rms(1e-5),
        *GATED_SILU,
        SlidingWindow(),
        Rope(partial=1.0),
        UNTIED,
        *(Repeats(f"{name}_bias", False) for name in ("attention", "mlp", "lm_head")),
        *(Repeats(name, 1) for name in ("full_attn_mod", "interpolate_factor")),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), joined_attention(), plain_mlp("mlp.gate_up_proj"))),
    tiny={
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 64, "original_max_position_embeddings": 16, "sliding_window": 24,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 4.0,
                            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
                            "original_max_position_embeddings": 16},
    },
)
