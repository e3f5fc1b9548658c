"""HunYuanMoEV1ForCausalLM: Hunyuan-A13B (transformers models/hunyuan_v1_moe): attention of the dense model, a shared expert."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megabridge.config.value_types import SIZE, Kind, list_of, shown
from megabridge.errors import ConfigError
from megabridge.families.core.family import Family
from megabridge.families.core.fields import Field, Fixed, Json, PerLayer, Repeats, RequiredValue, Unread
from megabridge.families.core.moe import experts, router, shared_expert
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, biases, embeddings, pre_norms, qk_norms, rms, sizes
from megabridge.families.hunyuan import NOTES, AlphaRope
from megabridge.mapping import WeightMap, block


@dataclass(frozen=True)
class OneWidth:
    """All experts and the shared one have the width `intermediate_size`, which config.json may repeat by layer."""

    def keys(self) -> Mapping[str, Kind]:
        return {key: SIZE.or_a(list_of(SIZE)).or_null() for key in ("moe_intermediate_size", "num_shared_expert")}

    def read(self, hf: Json) -> dict[str, Any]:
        width = hf.get("intermediate_size")
        for key, wanted in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
            given = PerLayer(Field(key, key, wanted)).read(hf)[key]
            if given != wanted:
                raise ConfigError(
                    f"{key}={shown(hf[key])} can't be represented: it must be {wanted}, with intermediate_size={width}."
                )
        return {"moe_ffn_hidden_size": width, "moe_shared_expert_intermediate_size": width}

    def write(self, native: Json) -> dict[str, Any]:
        names = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        if len({native[name] for name in names}) != 1:
            raise ConfigError(f"{', '.join(f'{name}={native[name]}' for name in names)} must be equal for config.json.")
        return {}


# fmt: off
FAMILY = Family(
    architecture="HunYuanMoEV1ForCausalLM",
    model_type="hunyuan_v1_moe",
    fields=(
        *sizes(),
        *rms(1e-5),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Fixed("qk_norm",                           "rotated"),
        *NOTES,
        *(Repeats(f"{name}", True) for name in ("norm_topk_prob", "use_mixed_mlp_moe")),
        Repeats("routed_scaling_factor",           1.0, False),
        *(Repeats(name, False) for name in ("mlp_bias", "group_limited_greedy")),
        Unread("moe_drop_tokens", "moe_random_routing_dropped_token"),
        RequiredValue("moe_layer_num_skipped",              (0,)),
        PerLayer(Field("num_moe_experts",          "num_experts", 1)),
        PerLayer(Field("moe_router_topk",          "moe_topk",    1)),
        OneWidth(),
        Fixed("moe_router_score_function",         "softmax"),  # over the chosen experts alone
        AlphaRope(),
        UNTIED,
    ),
    weights=WeightMap(
        embeddings(),
        block(*LAYER, pre_norms(), attention(), router("mlp.gate.wg"), experts(), shared_expert("mlp.shared_mlp"),
              qk_norms("self_attn.query_layernorm", "self_attn.key_layernorm", "self_attention.core_attention")),
    ),
    tiny={
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "tie_word_embeddings": True,
        "num_experts": 8, "moe_topk": 3, "use_qk_norm": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 100.0, "factor": 1.0},
    },
)
