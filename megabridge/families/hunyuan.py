"""HunYuanDenseV1ForCausalLM: Hunyuan dense, Hy-MT (transformers models/hunyuan_v1_dense).

Queries and keys are normalised after the rotary embedding.
"""

from collections.abc import Mapping
from typing import Any, Final, override

from megabridge.errors import ConfigError
from megabridge.families.core.family import Family
from megabridge.families.core.fields import FieldLike, Fixed, Json, Repeats, RequiredValue, Unread
from megabridge.families.core.parts import (
    GATED_SILU,
    LAYER,
    UNTIED,
    attention,
    biases,
    embeddings,
    gated_mlp,
    head_dim,
    pre_norms,
    qk_norms,
    rms,
    sizes,
)
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block


class AlphaRope(Rope):
    """With `alpha`, rope_type "dynamic" means a constant base, theta * alpha^(d / (d - 2))."""

    @override
    def parse(self, given: Mapping[str, Any], hf: Json) -> dict[str, Any]:
        if given.get("alpha") is None:
            return super().parse(given, hf)
        kind = given.get("rope_type", "default")
        if kind != "dynamic":
            raise ConfigError(f"rope_type={kind!r} can't be represented with alpha={given['alpha']}: it must be 'dynamic'.")
        ignored = ("factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
        return super().parse({key: value for key, value in given.items() if key not in ignored} | {"rope_type": "alpha"}, hf)

    @override
    def write(self, native: Json) -> dict[str, Any]:
        if native["rope"]["rope_type"] != "alpha":
            return super().write(native)
        return {"rope_parameters": {**native["rope"], "rope_type": "dynamic", "factor": 1.0}}


# fmt: off
NOTES: Final[tuple[FieldLike, ...]] = (
    Repeats("attention_head_dim",                  lambda hf: hf.get("head_dim") or head_dim(hf)),
    RequiredValue("use_qk_norm",                            (True,)),
    Repeats("use_rotary_pos_emb",                  True),
    Repeats("norm_type",                           "rms"),
    *(Repeats(f"use_{name}", False) for name in ("cla", "mla")),
    Repeats("position_embedding_xdrope",           False),
    Unread("cla_share_factor", "class_num", "dense_list", "pool_type", "org_vocab_size", "pad_id"),
    Unread(*(f"{of}_{end}_id" for of in ("im", "text", "video") for end in ("start", "end")), "im_newline_id", "mask_init_id"),
    Unread(*(f"enable_{name}_fp32{of}" for name, of in (("lm_head", ""), ("attention", "_softmax"), ("moe", "_combine")))),
)
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
        *NOTES,
        *(Repeats(name, 1) for name in ("num_experts", "moe_topk", "num_shared_expert")),
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
