"""GPT2LMHeadModel: GPT-2 (transformers models/gpt2/modeling_gpt2.py): learned positions, weights stored transposed."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Derived, Field, Fixed, Repeats, RequiredValue, Unread, given
from megabridge.families.core.parts import QKV_JOINED, TIED, embeddings, pre_norms
from megabridge.mapping import Transpose, WeightMap, block, weight

# fmt: off
FAMILY = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    fields=(
        Field("num_layers",                        "n_layer"),
        Field("hidden_size",                       "n_embd"),
        Field("ffn_hidden_size",                   "n_inner",             lambda hf: 4 * hf["n_embd"]),
        Field("num_attention_heads",               "n_head"),
        Derived("num_query_groups",                lambda hf: hf["n_head"]),
        Derived("kv_channels",                     lambda hf: hf["n_embd"] // hf["n_head"]),
        Field("vocab_size",                        "vocab_size"),
        Field("seq_length",                        "n_positions",         1024),
        Field("init_method_std",                   "initializer_range",   0.02),
        Fixed("normalization",                     "LayerNorm"),
        Field("layernorm_epsilon",                 "layer_norm_epsilon",  1e-5),
        Choice("activation_func",                  "activation_function", (("gelu_new", "gelu_new"), ("gelu", "gelu"))),
        Fixed("gated_linear_unit",                 False),
        Fixed("add_qkv_bias",                      True),
        Fixed("add_attn_proj_bias",                True),
        Fixed("add_mlp_bias",                      True),
        Fixed("rope",                              None),
        Fixed("learned_positions",                 True),
        RequiredValue("scale_attn_weights",                 (True,)),
        RequiredValue("scale_attn_by_inverse_layer_idx",    (False,)),
        RequiredValue("add_cross_attention",                (False,)),
        TIED,
        Repeats("n_ctx",                           lambda hf: given(hf, "n_positions", 1024)),
        Unread("reorder_and_upcast_attn"),  # affects the precision of scores only
        Unread("output_past", "predict_special_tokens"),
        Unread(*(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"))),
    ),
    weights=WeightMap(
        embeddings("transformer.wte", "transformer.ln_f"),
        weight("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        block("decoder.layers.{layer}", "transformer.h.{layer}",
              pre_norms("ln_1", "ln_2"),
              weight("self_attention.linear_qkv.weight",  "attn.c_attn.weight", layout=Transpose(QKV_JOINED)),
              weight("self_attention.linear_qkv.bias",    "attn.c_attn.bias",   layout=QKV_JOINED),
              weight("self_attention.linear_proj.weight", "attn.c_proj.weight", layout=Transpose()),
              weight("self_attention.linear_proj.bias",   "attn.c_proj.bias"),
              weight("mlp.linear_fc1.weight",             "mlp.c_fc.weight",    layout=Transpose()),
              weight("mlp.linear_fc1.bias",               "mlp.c_fc.bias"),
              weight("mlp.linear_fc2.weight",             "mlp.c_proj.weight",  layout=Transpose()),
              weight("mlp.linear_fc2.bias",               "mlp.c_proj.bias")),
    ),
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
    tiny={"n_embd": 64, "n_layer": 4, "n_head": 8, "vocab_size": 131, "n_positions": 64, "tie_word_embeddings": True,
          "bos_token_id": 1, "eos_token_id": 2, "activation_function": "gelu_new"},
)
