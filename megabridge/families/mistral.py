"""MistralForCausalLM: Mistral 7B, Nemo and Small, Ministral 8B; MinistralForCausalLM: Ministral 8B with its alternating windows;
Ministral3ForCausalLM: Ministral 3, text only (transformers models/mistral, ministral, ministral3).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, override

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Json
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, embeddings, gated_mlp, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block

# fmt: off
MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    fields=(
        *sizes(kv=8, positions=131072),
        *(*rms(), *GATED_SILU),
        SlidingWindow(default=4096),
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "sliding_window": 12, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
# fmt: on


# Ministral3Config's default of rope_parameters
_MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


class _Rope(Rope):
    """Ministral 3 has the temperature of its queries among the rotary settings."""

    @override
    def parse(self, given: Mapping[str, Any], hf: Json) -> dict[str, Any]:
        own = ("llama_4_scaling_beta", "max_position_embeddings")
        native = super().parse({key: value for key, value in given.items() if key not in own}, hf)
        beta = given.get("llama_4_scaling_beta")
        original = native["rope"].get("original_max_position_embeddings", hf.get("max_position_embeddings"))
        return {**native, "query_temperature": None if beta is None else (beta, original, 0)}

    @override
    def write(self, native: Json) -> dict[str, Any]:
        out = super().write(native)
        if native["query_temperature"] is not None:
            out["rope_parameters"]["llama_4_scaling_beta"] = native["query_temperature"][0]
        return out


MINISTRAL = replace(
    MISTRAL,
    architecture="MinistralForCausalLM",
    model_type="ministral",
    fields=(
        *(*sizes(kv=8, positions=131072), *rms(), *GATED_SILU),
        *(SlidingWindow(lambda hf, layer: True, default=4096), Rope(), UNTIED),
    ),
    tiny={
        **MISTRAL.tiny,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
    },
)
MINISTRAL3 = replace(
    MISTRAL,
    architecture="Ministral3ForCausalLM",
    model_type="ministral3",
    fields=(
        *(*sizes(kv=8, head=128, positions=262144), *rms(1e-5), *GATED_SILU),
        *(SlidingWindow(), _Rope(default=_MINISTRAL3_ROPE), UNTIED),
    ),
    tiny={
        **MISTRAL.tiny,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
)
FAMILIES = (MISTRAL, MINISTRAL, MINISTRAL3)
