"""Config fields and weight rules that families share. The only place with the parameter names of different backends.

Native names are megatron-core's (models/gpt/gpt_model.py, transformer/transformer_layer.py); alternatives are Transformer Engine's,
which puts a norm into the linear that follows it.
"""

from __future__ import annotations

from typing import Final

from megabridge.families.core.fields import Choice, Field, FieldLike, Fixed, Json
from megabridge.mapping import Fuse, FusedSource, Layout, Same, weight
from megabridge.mapping.rules import Rules

LAYER: Final = ("decoder.layers.{layer}", "model.layers.{layer}")
WEIGHT_BIAS: Final = ("weight", "bias")
QKV: Final = Fuse(groups="num_query_groups", ratio=("heads_per_group", 1, 1))
QKV_JOINED: Final = FusedSource(groups="num_query_groups", ratio=("heads_per_group", 1, 1))
GATE_UP: Final = Fuse(groups=1, ratio=(1, 1))
VOCABULARY: Final = Same(rows="vocab_size")

# fmt: off
GATED_SILU: Final[tuple[FieldLike, ...]] = (
    Choice("activation_func",                      "hidden_act", (("silu", "silu"), ("swish", "silu"))),
    Fixed("gated_linear_unit",                     True),
)
UNTIED: Final = Field("share_embeddings_and_output_weights", "tie_word_embeddings", False)
TIED: Final = Field("share_embeddings_and_output_weights", "tie_word_embeddings", True)


def head_dim(hf: Json) -> int | None:
    """Default width of an attention head: hidden_size / num_attention_heads."""
    hidden, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    return hidden // heads if hidden and heads else None


def body_sizes(*, kv: int | None = None, positions: int = 2048, std: float = 0.02) -> tuple[FieldLike, ...]:
    """Sizes of a decoder without the width of a head. The arguments are the architecture's defaults for absent keys: key and value
    heads (None: as many as query heads), positions, initial standard deviation."""

    def kv_heads(hf: Json) -> int | None:
        return hf.get("num_attention_heads") if kv is None or "num_key_value_heads" in hf else kv

    return (
        Field("num_layers",                        "num_hidden_layers"),
        Field("hidden_size",                       "hidden_size"),
        Field("ffn_hidden_size",                   "intermediate_size"),
        Field("num_attention_heads",               "num_attention_heads"),
        Field("num_query_groups",                  "num_key_value_heads", kv_heads),
        Field("vocab_size",                        "vocab_size"),
        Field("seq_length",                        "max_position_embeddings", positions),
        Field("init_method_std",                   "initializer_range",   std),
    )


def sizes(*, kv: int | None = None, head: int | None = None, positions: int = 2048, std: float = 0.02) -> tuple[FieldLike, ...]:
    """Sizes of a decoder: `body_sizes`, and the width of a head (None: hidden size / heads)."""

    def width(hf: Json) -> int | None:
        return head_dim(hf) if head is None or "head_dim" in hf else head

    return (*body_sizes(kv=kv, positions=positions, std=std), Field("kv_channels", "head_dim", width))


def rms(eps: float = 1e-6) -> tuple[FieldLike, ...]:
    """RMSNorm; `eps` is the architecture's default."""
    return (Fixed("normalization", "RMSNorm"), Field("layernorm_epsilon", "rms_norm_eps", eps))


def biases(qkv: str, proj: str | None, mlp: str | None = None, *, default: bool = False) -> tuple[FieldLike, ...]:
    """Biases of linears, by the keys that turn them on; None if they never have one."""
    return (
        Field("add_qkv_bias", qkv, default),
        Fixed("add_attn_proj_bias", False) if proj is None else Field("add_attn_proj_bias", proj, default),
        Fixed("add_mlp_bias", False) if mlp is None else Field("add_mlp_bias", mlp, default),
    )


def embeddings(embed: str = "model.embed_tokens", norm: str = "model.norm", head: str = "lm_head") -> Rules:
    return (
        weight("embedding.word_embeddings.weight",  f"{embed}.weight", layout=VOCABULARY),
        weight("output_layer.weight",               f"{head}.weight",  layout=VOCABULARY, when_tied=f"{embed}.weight"),
        weight("output_layer.bias",                 f"{head}.bias",    layout=VOCABULARY),
        weight("decoder.final_layernorm.weight",    f"{norm}.weight"),
        weight("decoder.final_layernorm.bias",      f"{norm}.bias"),
    )


def pre_norms(attention: str = "input_layernorm", mlp: str = "post_attention_layernorm") -> Rules:
    """Norms of the inputs of attention and MLP."""
    return (
        *(weight((f"input_layernorm.{p}", f"self_attention.linear_qkv.layer_norm_{p}"), f"{attention}.{p}") for p in WEIGHT_BIAS),
        *(weight((f"pre_mlp_layernorm.{p}", f"mlp.linear_fc1.layer_norm_{p}"), f"{mlp}.{p}") for p in WEIGHT_BIAS),
    )


def post_norms(attention: str = "post_attention_layernorm", mlp: str = "post_feedforward_layernorm") -> Rules:
    """Norms of the outputs of attention and MLP."""
    return (
        weight("self_attn_bda.norm.weight",         f"{attention}.weight"),
        weight("mlp_bda.norm.weight",               f"{mlp}.weight"),
    )


def qk_norms(q: str = "self_attn.q_norm", k: str = "self_attn.k_norm", native: str = "self_attention") -> Rules:
    return (
        weight(f"{native}.q_layernorm.weight",      f"{q}.weight"),
        weight(f"{native}.k_layernorm.weight",      f"{k}.weight"),
    )


def attention(prefix: str = "self_attn", out: str = "o_proj") -> Rules:
    return (
        *(weight(f"self_attention.linear_qkv.{p}",  *(f"{prefix}.{part}_proj.{p}" for part in "qkv"), layout=QKV)
          for p in WEIGHT_BIAS),
        *(weight(f"self_attention.linear_proj.{p}", f"{prefix}.{out}.{p}") for p in WEIGHT_BIAS),
    )


def joined_attention(qkv: str = "self_attn.qkv_proj", out: str = "self_attn.o_proj", layout: Layout = QKV_JOINED) -> Rules:
    """Queries, keys and values in one tensor."""
    return (
        *(weight(f"self_attention.linear_qkv.{p}",  f"{qkv}.{p}", layout=layout) for p in WEIGHT_BIAS),
        *(weight(f"self_attention.linear_proj.{p}", f"{out}.{p}") for p in WEIGHT_BIAS),
    )


def gated_mlp(gate: str = "mlp.gate_proj", up: str = "mlp.up_proj", down: str = "mlp.down_proj") -> Rules:
    return (
        *(weight(f"mlp.linear_fc1.{p}",             f"{gate}.{p}", f"{up}.{p}", layout=GATE_UP) for p in WEIGHT_BIAS),
        *(weight(f"mlp.linear_fc2.{p}",             f"{down}.{p}") for p in WEIGHT_BIAS),
    )


def plain_mlp(up: str = "mlp.up_proj", down: str = "mlp.down_proj") -> Rules:
    """An MLP whose first tensor is the native one: without a gate, or with gate and up concatenated in one tensor."""
    return (
        *(weight(f"mlp.linear_fc1.{p}",             f"{up}.{p}") for p in WEIGHT_BIAS),
        *(weight(f"mlp.linear_fc2.{p}",             f"{down}.{p}") for p in WEIGHT_BIAS),
    )
