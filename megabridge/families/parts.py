"""Parts that families share. The only place that knows what different backends call the same parameter.

Native names are megatron-core's (gpt_model.py, transformer_layer.py); alternatives are Transformer Engine's, which puts a norm into
the linear that follows it.
"""

from __future__ import annotations

from typing import Final

from megabridge.families.fields import Choice, Field, FieldLike, Fixed, Json
from megabridge.mapping import Fuse, Same, weight
from megabridge.mapping.rules import Rules

LAYER: Final = ("decoder.layers.{layer}", "model.layers.{layer}")
QKV: Final = Fuse(groups="num_query_groups", ratio=("heads_per_group", 1, 1))
GATE_UP: Final = Fuse(groups=1, ratio=(1, 1))
VOCABULARY: Final = Same(rows="vocab_size")

# fmt: off
SIZES: Final[tuple[FieldLike, ...]] = (
    Field("num_layers",                            "num_hidden_layers"),
    Field("hidden_size",                           "hidden_size"),
    Field("ffn_hidden_size",                       "intermediate_size"),
    Field("num_attention_heads",                   "num_attention_heads"),
    Field("num_query_groups",                      "num_key_value_heads", lambda hf: hf.get("num_attention_heads")),
    Field("kv_channels",                           "head_dim",            lambda hf: head_dim(hf)),
    Field("vocab_size",                            "vocab_size"),
    Field("seq_length",                            "max_position_embeddings", 2048),
)
GATED_SILU: Final[tuple[FieldLike, ...]] = (
    Choice("activation_func",                      "hidden_act", (("silu", "silu"), ("swish", "silu"))),
    Fixed("gated_linear_unit",                     True),
)


def head_dim(hf: Json) -> int | None:
    """Width of one attention head where config.json doesn't say it."""
    hidden, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    return hidden // heads if hidden and heads else None


def embeddings() -> Rules:
    return (
        weight("embedding.word_embeddings.weight",  "model.embed_tokens.weight", layout=VOCABULARY),
        weight("output_layer.weight",               "lm_head.weight",            layout=VOCABULARY,
               when_tied="model.embed_tokens.weight"),
        weight("decoder.final_layernorm.weight",    "model.norm.weight"),
    )


def attention() -> Rules:
    return (
        weight(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), "input_layernorm.weight"),
        weight("self_attention.linear_qkv.weight",  *(f"self_attn.{p}_proj.weight" for p in "qkv"), layout=QKV),
        weight("self_attention.linear_qkv.bias",    *(f"self_attn.{p}_proj.bias" for p in "qkv"),   layout=QKV),
        weight("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        weight("self_attention.linear_proj.bias",   "self_attn.o_proj.bias"),
    )


def gated_mlp() -> Rules:
    return (
        weight(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), "post_attention_layernorm.weight"),
        weight("mlp.linear_fc1.weight",             "mlp.gate_proj.weight", "mlp.up_proj.weight", layout=GATE_UP),
        weight("mlp.linear_fc1.bias",               "mlp.gate_proj.bias",   "mlp.up_proj.bias",   layout=GATE_UP),
        weight("mlp.linear_fc2.weight",             "mlp.down_proj.weight"),
        weight("mlp.linear_fc2.bias",               "mlp.down_proj.bias"),
    )
