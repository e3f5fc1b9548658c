"""Llama4ForCausalLM: the text models of Llama 4 Scout and Maverick (transformers models/llama4).

Layers with a rotary embedding attend within chunks; those without attend to everything, with a temperature that grows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megabridge.config.value_types import FLAG, Kind, list_of
from megabridge.families.core import parts
from megabridge.families.core.family import Family, Parameters
from megabridge.families.core.fields import Choice, Derived, Field, Fixed, Json, Repeats, Unread, given
from megabridge.families.core.moe import layers_named, mixture, router, shared_expert, stacked_experts
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, biases, embeddings, gated_mlp, pre_norms, rms
from megabridge.families.core.ranges import COUNT, FACTOR, POSITIONS, STEP
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.families.smollm3 import NoRope, has_rope
from megabridge.mapping import Transpose, WeightMap, block


@dataclass(frozen=True)
class MixtureLayers:
    """The layers with experts: a list, or every n-th. Native: moe_layer_freq, 1 for a layer with experts."""

    def keys(self) -> Mapping[str, Kind]:
        return {"moe_layers": list_of(COUNT).or_null(), "interleave_moe_layer_step": STEP}

    def read(self, hf: Json) -> dict[str, Any]:
        layers, step, given = hf.get("num_hidden_layers", 0), hf.get("interleave_moe_layer_step", 1), layers_named(hf, "moe_layers")
        mixed = {*(range(step - 1, layers, step) if given is None else given)}
        return {"moe_layer_freq": [int(layer in mixed) for layer in range(layers)]}

    def write(self, native: Json) -> dict[str, Any]:
        return {"moe_layers": [layer for layer, mixed in enumerate(native["moe_layer_freq"]) if mixed]}


@dataclass(frozen=True)
class Temperature:
    """The temperature of queries in layers without a rotary embedding; positions count from 1."""

    def keys(self) -> Mapping[str, Kind]:
        return {"attn_temperature_tuning": FLAG.or_a(COUNT), "attn_scale": FACTOR, "floor_scale": POSITIONS}

    def read(self, hf: Json) -> dict[str, Any]:
        settings = (hf.get("attn_scale", 0.1), hf.get("floor_scale", 8192), 1)
        return {"query_temperature": settings if hf.get("attn_temperature_tuning", True) else None}

    def write(self, native: Json) -> dict[str, Any]:
        if native["query_temperature"] is None:
            return {"attn_temperature_tuning": False}
        scale, floor, _ = native["query_temperature"]
        return {"attn_temperature_tuning": True, "attn_scale": scale, "floor_scale": floor}


# fmt: off
FAMILY = Family(
    architecture="Llama4ForCausalLM",
    model_type="llama4_text",
    fields=(
        *parts.sizes(kv=8, head=128, positions=131072),
        Field("ffn_hidden_size",                   "intermediate_size_mlp", 16384),  # width of dense layers
        *rms(1e-5),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Choice("qk_norm",                          "use_qk_norm", ((True, "l2"), (False, None))),
        *mixture(experts="num_local_experts", width="intermediate_size", aux=None, defaults=(16, 1, 8192)),
        Derived("moe_shared_expert_intermediate_size", lambda hf: given(hf, "intermediate_size", 8192)),
        MixtureLayers(),
        Fixed("moe_router_score_function",         "sigmoid"),
        Fixed("router_normalize",                  False),
        Fixed("moe_apply_probs_on_input",          True),
        NoRope(),
        Temperature(),
        SlidingWindow(has_rope, default=8192, key="attention_chunk_size", kind="chunked_attention"),
        Fixed("attention_chunks",                  True),
        Fixed("rotary_interleaved",                True),
        Rope(5e5),
        UNTIED,
        Repeats("nope_layer_interval",             lambda hf: given(hf, "no_rope_layer_interval", 4)),
        Unread("for_llm_compressor"),
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), gated_mlp(*(f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))),
        router("feed_forward.router"), stacked_experts(Transpose(), Transpose(), "feed_forward.experts"),
        shared_expert("feed_forward.shared_expert"),
    )),
    parameters=Parameters(is_transposed=False),  # although the weights are: the class doesn't say so
    tiny={
        "hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "num_local_experts": 8,
        "num_experts_per_tok": 1, "moe_layers": [1, 2, 3], "no_rope_layers": [1, 0, 1, 0], "attention_chunk_size": 12,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
        "attn_temperature_tuning": True, "attn_scale": 0.1, "floor_scale": 8, "use_qk_norm": True, "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
)
