"""Config fields and weight rules of multi-latent attention (MLA) that families share."""

from __future__ import annotations

from megabridge.families.core.fields import Derived, Field, FieldLike, Fixed, Json, Repeats, RequiredValue, given, unless_null
from megabridge.families.core.parts import body_sizes, rms
from megabridge.mapping import weight
from megabridge.mapping.rules import Rules


# fmt: off
def mla_sizes(
    *, q_rank: int | None, kv_rank: int, nope: int, rope: int, value: int, positions: int, heads: int | None = None,
    eps: float = 1e-6,
) -> tuple[FieldLike, ...]:
    """Sizes and norms of a decoder with multi-latent attention; the arguments are the config class's defaults."""

    def width(hf: Json) -> int:
        return int(given(hf, "qk_nope_head_dim", nope) + given(hf, "qk_rope_head_dim", rope))

    return (
        *body_sizes(kv=heads, positions=positions),
        *rms(eps),
        Fixed("multi_latent_attention",            True),
        Fixed("qk_layernorm",                      True),
        Field("q_lora_rank",                       "q_lora_rank",      unless_null("q_lora_rank", q_rank)),
        Field("kv_lora_rank",                      "kv_lora_rank",     kv_rank),
        Field("qk_head_dim",                       "qk_nope_head_dim", nope),
        Field("qk_pos_emb_head_dim",               "qk_rope_head_dim", rope),
        Field("v_head_dim",                        "v_head_dim",       value),
        Derived("kv_channels",                     width),
        Derived("qk_norm_epsilon",                 lambda hf: None if given(hf, "rms_norm_eps", eps) == 1e-6 else 1e-6),
        RequiredValue("attention_bias",                     (False,)),
        Repeats("qk_head_dim",                     width),
        Repeats("head_dim",                        lambda hf: given(hf, "qk_rope_head_dim", rope)),  # the rotated part
    )


def mla_attention(prefix: str = "self_attn") -> Rules:
    """Rules for queries with or without a low rank; Transformer Engine puts a norm into the up-projection that follows it."""
    a, p = "self_attention", prefix
    return (
        weight(f"{a}.linear_q_proj.weight",        f"{p}.q_proj.weight"),
        weight(f"{a}.linear_q_down_proj.weight",   f"{p}.q_a_proj.weight"),
        weight((f"{a}.q_layernorm.weight", f"{a}.linear_q_up_proj.layer_norm_weight"), f"{p}.q_a_layernorm.weight"),
        weight(f"{a}.linear_q_up_proj.weight",     f"{p}.q_b_proj.weight"),
        weight(f"{a}.linear_kv_down_proj.weight",  f"{p}.kv_a_proj_with_mqa.weight"),
        weight((f"{a}.kv_layernorm.weight", f"{a}.linear_kv_up_proj.layer_norm_weight"), f"{p}.kv_a_layernorm.weight"),
        weight(f"{a}.linear_kv_up_proj.weight",    f"{p}.kv_b_proj.weight"),
        weight(f"{a}.linear_proj.weight",          f"{p}.o_proj.weight"),
    )
