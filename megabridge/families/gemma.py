"""GemmaForCausalLM: Gemma; Gemma2ForCausalLM: Gemma 2 (transformers models/gemma, gemma2)."""

from dataclasses import replace
from typing import Any

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Converted, Derived, Field, Fixed, Repeats, RequiredValue, unless_null
from megabridge.families.core.parts import LAYER, TIED, attention, biases, embeddings, gated_mlp, post_norms, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow, every
from megabridge.mapping import WeightMap, block

# fmt: off
TANH_GELU = (("gelu_pytorch_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu_pytorch_tanh"))  # published configs say gelu and mean tanh
SHARED = (
    *rms(),
    Fixed("layernorm_zero_centered_gamma",         True),
    Fixed("gated_linear_unit",                     True),
    *biases("attention_bias", "attention_bias"),
    Derived("embedding_multiplier",                lambda hf: hf["hidden_size"] ** 0.5),
    Fixed("round_embedding_multiplier",            True),
    RequiredValue("use_bidirectional_attention",            (None, False)),
    TIED,
)
GEMMA = Family(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    fields=(
        *sizes(kv=16, head=256, positions=8192),
        *SHARED,
        Choice("activation_func",                  "hidden_act",          TANH_GELU),
        RequiredValue("hidden_activation",                  (None, "gelu_pytorch_tanh")),
        Rope(),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), gated_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True,
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)


def _scalar(scale: float) -> int | float:
    value = round(scale**-2, 6)
    return int(value) if value == int(value) else value


SECOND: tuple[Any, ...] = (
    *SHARED,
    Choice("activation_func",                      "hidden_activation",   TANH_GELU),
    Repeats("hidden_act",                          "gelu_pytorch_tanh", "gelu"),
    Fixed("post_norm",                             True),
    Converted("softmax_scale",                     "query_pre_attn_scalar", lambda value: value**-0.5, _scalar, 256),
)
SANDWICH = (pre_norms(mlp="pre_feedforward_layernorm"), post_norms(), attention(), gated_mlp())
GEMMA2 = replace(
    GEMMA,
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    fields=(
        *sizes(kv=4, head=256, positions=8192),
        *SECOND,
        Field("attention_softcap",                 "attn_logit_softcapping",  unless_null("attn_logit_softcapping", 50.0)),
        Field("logits_softcap",                    "final_logit_softcapping", unless_null("final_logit_softcapping", 30.0)),
        SlidingWindow(every(2), default=4096),
        Rope(),
        Repeats("sliding_window_size",             lambda hf: hf.get("sliding_window", 4096)),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, *SANDWICH)),
    tiny={**{k: v for k, v in GEMMA.tiny.items() if k != "hidden_act"}, "hidden_activation": "gelu_pytorch_tanh",
          "sliding_window": 12, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0},
)
FAMILIES = (GEMMA, GEMMA2)
