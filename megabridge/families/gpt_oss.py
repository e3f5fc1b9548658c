"""GptOssForCausalLM: gpt-oss 20B and 120B (transformers models/gpt_oss): attention sinks, experts with biases."""

from megabridge.families.core.family import Family, Parameters
from megabridge.families.core.fields import Field, Fixed, Repeats, RequiredValue, given
from megabridge.families.core.moe import EXPERTS, mixture, router, stacked_experts
from megabridge.families.core.parts import LAYER, UNTIED, attention, embeddings, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow, every, given_rope
from megabridge.mapping import Interleave, Stack, Transpose, WeightMap, block, weight

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip

# fmt: off
FAMILY = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    fields=(
        *sizes(kv=8, head=64, positions=131072),
        *rms(1e-5),
        RequiredValue("hidden_act",                         ("silu",)),  # the key has no effect
        Fixed("activation_func",                   "quick_gelu"),
        Fixed("gated_linear_unit",                 True),
        Fixed("glu_linear_offset",                 1.0),
        RequiredValue("swiglu_alpha",                       (1.702,)),
        Field("activation_func_clamp_value",       "swiglu_limit", 7.0),
        Field("add_qkv_bias",                      "attention_bias", True),
        Field("add_attn_proj_bias",                "attention_bias", True),
        Fixed("add_mlp_bias",                      True),
        Fixed("softmax_type",                      "learnable"),
        *mixture(experts="num_local_experts", width="intermediate_size", defaults=(128, 4, 2880)),
        Fixed("moe_router_score_function",         "softmax"),  # over the chosen experts alone
        SlidingWindow(every(2), default=128),
        Rope(15e4, default=YARN),
        UNTIED,
        Repeats("experts_per_token",               lambda hf: given(hf, "num_experts_per_tok", 4)),
        Repeats("initial_context_length",          lambda hf: given_rope(hf, YARN).get("original_max_position_embeddings")),
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), router("mlp.router"),
        stacked_experts(Transpose(Interleave()), Transpose()),
        weight("self_attention.core_attention.softmax_offset", "self_attn.sinks"),
        weight("mlp.router.bias",                  "mlp.router.bias"),
        weight("mlp.experts.linear_fc1.bias",      "mlp.experts.gate_up_proj_bias", layout=Stack(EXPERTS, Interleave())),
        weight("mlp.experts.linear_fc2.bias",      "mlp.experts.down_proj_bias",    layout=Stack(EXPERTS)),
    )),
    parameters=Parameters(is_transposed=True),
    tiny={
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "num_local_experts": 8, "num_experts_per_tok": 2,
        "attention_bias": True, "sliding_window": 12, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {**YARN, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    },
)
