"""PhimoeForCausalLM: Phi-3.5-MoE (transformers models/phimoe): two experts chosen by SparseMixer, LayerNorms, an output bias.

Training chooses the best experts, as inference does; transformers samples them. Beyond the original length the long factors are
used, as in the authors' own model; transformers 5.23 keeps the short ones. input_jitter_noise is noise in training only.
"""

from collections.abc import Mapping
from typing import Any, override

from megabridge.config.value_types import same
from megabridge.errors import ConfigError
from megabridge.families.core.family import Family
from megabridge.families.core.fields import Field, Fixed, Json, RequiredValue
from megabridge.families.core.moe import experts, mixture, router
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, biases, embeddings, pre_norms, sizes
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block


class MscaleRope(Rope):
    """The attention_factor of longrope has two names, short_mscale and long_mscale, which must be equal."""

    @override
    def parse(self, given: Mapping[str, Any], hf: Json) -> dict[str, Any]:
        if (kind := given.get("rope_type", "default")) == "default":
            return super().parse(given, hf)
        rest = {key: value for key, value in given.items() if key not in ("short_mscale", "long_mscale")}
        short, long = given.get("short_mscale"), given.get("long_mscale")
        if kind != "longrope" or short is None or not same(short, long):
            raise ConfigError(
                f"rope_type={kind!r}, short_mscale={short!r}, long_mscale={long!r} can't be represented; supported: longrope with "
                "both equal."
            )
        return super().parse({**rest, "attention_factor": short}, hf)

    @override
    def write(self, native: Json) -> dict[str, Any]:
        out = super().write(native)
        if (scale := out["rope_parameters"].pop("attention_factor", None)) is not None:
            out["rope_parameters"] |= {"short_mscale": scale, "long_mscale": scale}
        return out


# fmt: off
FAMILY = Family(
    architecture="PhimoeForCausalLM",
    model_type="phimoe",
    other_names=("PhiMoEForCausalLM",),
    fields=(
        *sizes(kv=8, positions=131072),
        Fixed("normalization",                     "LayerNorm"),
        Field("layernorm_epsilon",                 "rms_norm_eps", 1e-5),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        Field("output_bias",                       "lm_head_bias", False),
        *mixture(experts="num_local_experts", width="intermediate_size", defaults=(16, 2, 6400)),
        RequiredValue("num_experts_per_tok",                (2,)),
        Fixed("moe_router_score_function",         "softmax"),
        Fixed("moe_router_pre_softmax",            True),
        Fixed("router",                            "megabridge.models.layers.router:SparseMixer"),
        Field("router_jitter",                     "router_jitter_noise", 0.01),
        SlidingWindow(),
        MscaleRope(1e6),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), router("block_sparse_moe.gate"),
        experts(*(f"block_sparse_moe.experts.{{expert}}.{name}" for name in ("w1", "w3", "w2"))),
    )),
    tiny={
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 64, "original_max_position_embeddings": 64, "sliding_window": 24,
        "attention_bias": True, "lm_head_bias": True, "num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
                            "long_factor": [1.0, 2.0, 3.0, 4.0], "short_mscale": 1.24, "long_mscale": 1.24,
                            "original_max_position_embeddings": 64},
    },
)
