"""Ernie4_5_MoeForCausalLM: ERNIE 4.5 21B-A3B, 300B-A47B (transformers models/ernie4_5_moe): softmax scores with a bias."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megabridge.config.value_types import Kind, whole
from megabridge.errors import ConfigError
from megabridge.families.core.family import Family
from megabridge.families.core.fields import Field, Fixed, Json, Repeats, RequiredValue, Unread
from megabridge.families.core.moe import MtpLayers, SharedExperts, experts, mixture, router, shared_expert
from megabridge.families.core.parts import GATED_SILU, LAYER, TIED, attention, embeddings, gated_mlp, pre_norms, rms, sizes
from megabridge.families.core.ranges import COUNT, STEP
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import Unsqueeze, WeightMap, block, weight


@dataclass(frozen=True)
class MixtureRange:
    """Every n-th layer in a range has experts. Native: moe_layer_freq, 1 for a layer with experts."""

    def keys(self) -> Mapping[str, Kind]:
        return {"moe_layer_start_index": COUNT, "moe_layer_end_index": whole(-1, 16384), "moe_layer_interval": STEP}

    def read(self, hf: Json) -> dict[str, Any]:
        layers, step = hf.get("num_hidden_layers", 0), hf.get("moe_layer_interval", 1)
        first, last = hf.get("moe_layer_start_index", 1), hf.get("moe_layer_end_index", -1)
        last = layers - 1 if last == -1 else last
        return {"moe_layer_freq": [int((layer + 1) % step == 0 and first <= layer <= last) for layer in range(layers)]}

    def write(self, native: Json) -> dict[str, Any]:
        pattern = native["moe_layer_freq"]
        mixed = [layer for layer, flag in enumerate(pattern) if flag] or [len(pattern)]
        step = mixed[1] - mixed[0] if len(mixed) > 1 else 1
        out = {"moe_layer_start_index": mixed[0], "moe_layer_end_index": mixed[-1], "moe_layer_interval": step}
        if self.read({"num_hidden_layers": len(pattern), **out})["moe_layer_freq"] != pattern:
            raise ConfigError(f"moe_layer_freq={pattern} can't be written to config.json: mixtures must be each n-th of a range.")
        return out


# fmt: off
FAMILY = Family(
    architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    fields=(
        *sizes(kv=4, positions=131072),
        *rms(1e-5),
        *GATED_SILU,
        RequiredValue("use_bias",                           (False,)),
        *mixture(experts="moe_num_experts", topk="moe_k", defaults=(64, 6, 1536)),
        Fixed("moe_router_score_function",         "softmax"),
        Fixed("moe_router_pre_softmax",            True),
        Fixed("router_bias",                       True),
        Fixed("router_normalize",                  True),
        Field("router_epsilon",                    "moe_norm_min", 1e-12),
        MixtureRange(),
        MtpLayers(),
        SharedExperts("moe_num_shared_experts", default=2, width=("moe_intermediate_size", 1536)),
        Fixed("rotary_interleaved",                True),
        Rope(theta=5e5),
        TIED,
        Repeats("moe_gate",                        "topk", "topk_fused"),
        Repeats("moe_gate_act",                    "softmax"),
        Repeats("moe_use_aux_free",                True),
        Unread("moe_capacity"),  # capacity of experts, in training
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), gated_mlp(), router(), experts(), shared_expert("mlp.shared_experts"),
        weight("mlp.router.expert_bias",           "mlp.moe_statics.e_score_correction_bias", layout=Unsqueeze()),
    )),
    passthrough=("model.mtp_*",),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 256, "use_bias": False,
        "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 3,
        "moe_layer_interval": 1, "moe_norm_min": 1e-12, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
