"""Exaone4ForCausalLM: EXAONE 4.0 (transformers models/exaone4): in models with windows, layers without one have no RoPE."""

from megabridge.config.value_types import Kind
from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed, Json
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    UNTIED,
    attention,
    embeddings,
    gated_mlp,
    post_norms,
    qk_norms,
    rms,
    sizes,
)
from megabridge.families.core.rope_and_windows import PERIOD, Rope, SlidingWindow
from megabridge.mapping import WeightMap, block

PATTERN = PERIOD.or_a(Kind("a text of L and G", lambda value: isinstance(value, str) and bool(value) and set(value) <= {*"LG"}))


def _is_windowed(hf: Json, layer: int) -> bool:
    pattern = hf.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # LLLG: L has a window; the last layer never has
        return pattern[layer % len(pattern)] == "L" and layer < hf["num_hidden_layers"] - 1
    return bool(pattern) and bool((layer + 1) % pattern)


WINDOWS = SlidingWindow(
    _is_windowed, default=4096, nope_elsewhere="with windows", pattern_keys=("sliding_window_pattern",), pattern=PATTERN
)
# fmt: off
FAMILY = Family(
    architecture="Exaone4ForCausalLM",
    model_type="exaone4",
    fields=(
        *sizes(kv=32),
        *rms(1e-5),
        *GATED_SILU,
        Fixed("pre_norm",                          False),
        Fixed("post_norm",                         True),
        Fixed("qk_norm",                           "head"),
        WINDOWS,
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, post_norms(), attention(), qk_norms(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
)
