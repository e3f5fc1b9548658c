"""SmolLM3ForCausalLM: SmolLM3 (transformers models/smollm3/modeling_smollm3.py): every fourth layer has no rotary embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megabridge.config.value_types import Kind, list_of, one_of
from megabridge.errors import ConfigError
from megabridge.families.core.family import Family
from megabridge.families.core.fields import Json, Unread
from megabridge.families.core.parts import GATED_SILU, LAYER, TIED, attention, biases, embeddings, gated_mlp, pre_norms, rms, sizes
from megabridge.families.core.ranges import STEP
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block


@dataclass(frozen=True)
class NoRope:
    """`no_rope_layers` is 1 for layers with a rotary embedding, megatron-core's no_rope_freq for those without."""

    def keys(self) -> Mapping[str, Kind]:
        return {"no_rope_layers": list_of(one_of(0, 1)).or_null(), "no_rope_layer_interval": STEP}

    def read(self, hf: Json) -> dict[str, Any]:
        return {"no_rope_freq": [int(not has_rope(hf, layer)) for layer in range(hf["num_hidden_layers"])]}

    def write(self, native: Json) -> dict[str, Any]:
        return {"no_rope_layers": [1 - flag for flag in native["no_rope_freq"]]}


def has_rope(hf: Json, layer: int) -> bool:
    """Whether a layer has a rotary embedding. Raises ConfigError for a list without an entry for each layer."""
    given, layers = hf.get("no_rope_layers"), hf["num_hidden_layers"]
    if given and len(given) != layers:
        raise ConfigError(f"no_rope_layers must say 0 or 1 for each of {layers} layers, not for {len(given)}.")
    return bool(given[layer] if given else (layer + 1) % hf.get("no_rope_layer_interval", 4))


# fmt: off
FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    fields=(
        *sizes(kv=4, positions=32768),
        *rms(),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias", "mlp_bias"),
        NoRope(),
        SlidingWindow(lambda hf, layer: not has_rope(hf, layer), switch="use_sliding_window"),
        Rope(theta=2e6),
        TIED,
        Unread("max_window_layers"),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
