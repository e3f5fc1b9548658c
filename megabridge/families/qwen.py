"""Qwen2ForCausalLM: Qwen 2 and 2.5, QwQ; Qwen3ForCausalLM: Qwen 3 (transformers models/qwen2, qwen3)."""

from dataclasses import replace

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed, Json, Repeats
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    UNTIED,
    attention,
    biases,
    embeddings,
    gated_mlp,
    pre_norms,
    qk_norms,
    rms,
    sizes,
)
from megabridge.families.core.ranges import COUNT
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block


def _is_windowed(hf: Json, layer: int) -> bool:
    return layer >= int(hf.get("max_window_layers", 28))


WINDOWS = SlidingWindow(_is_windowed, default=4096, switch="use_sliding_window", pattern_keys=("max_window_layers",), pattern=COUNT)
# fmt: off
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    fields=(
        *sizes(kv=32, positions=32768),
        *rms(),
        *GATED_SILU,
        Fixed("add_qkv_bias",                      True),
        WINDOWS,
        Rope(),
        UNTIED,
        Repeats("use_mrope",                       False),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "sliding_window": 12, "use_sliding_window": True,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    fields=(
        *sizes(kv=32, head=128, positions=32768),
        *rms(),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Fixed("qk_norm",                           "head"),
        WINDOWS,
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), qk_norms(), gated_mlp())),
    tiny={**QWEN2.tiny, "head_dim": 16, "attention_bias": True, "use_sliding_window": False,
          "sliding_window": None, "layer_types": ["full_attention"] * 4,
          "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}},
)
FAMILIES = (QWEN2, QWEN3)
