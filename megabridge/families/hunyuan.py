"""HunYuanDenseV1ForCausalLM: Hunyuan dense, Hy-MT (transformers models/hunyuan_v1_dense).

Queries and keys are normalised after they are rotated.
"""

from typing import Any

from megabridge.families.family import Family
from megabridge.families.fields import Fixed, Json
from megabridge.families.parts import (
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
from megabridge.families.positions import Rope
from megabridge.mapping import WeightMap, block


class AlphaRope(Rope):
    """With `alpha`, checkpoints say rope_type dynamic and mean a base stretched once and for all: theta * alpha^(d / (d - 2))."""

    def read(self, hf: Json) -> dict[str, Any]:
        given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        if not given.get("alpha"):
            return super().read(hf)
        theta = given.get("rope_theta") or hf.get("rope_theta") or self.theta
        return {"rope": {"rope_type": "alpha", "rope_theta": theta, "alpha": given["alpha"]}}

    def write(self, native: Json) -> dict[str, Any]:
        if native["rope"]["rope_type"] != "alpha":
            return super().write(native)
        return {"rope_parameters": {**native["rope"], "rope_type": "dynamic", "factor": 1.0}}


# fmt: off
FAMILY = Family(
    architecture="HunYuanDenseV1ForCausalLM",
    model_type="hunyuan_v1_dense",
    fields=(
        *sizes(),
        *rms(1e-5),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Fixed("qk_norm",                           "rotated"),
        AlphaRope(),
        UNTIED,
    ),
    weights=WeightMap(
        embeddings(),
        block(*LAYER, pre_norms(), attention(), gated_mlp(),
              qk_norms("self_attn.query_layernorm", "self_attn.key_layernorm", "self_attention.core_attention")),
    ),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 100.0, "factor": 1.0},
    },
)
