"""Starcoder2ForCausalLM: StarCoder2 (transformers models/starcoder2/modeling_starcoder2.py)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Field, Fixed, Repeats, Unread
from megabridge.families.core.parts import LAYER, TIED, attention, biases, embeddings, plain_mlp, pre_norms, sizes
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    fields=(
        *sizes(kv=2, positions=4096, std=0.018042),
        Fixed("normalization",                     "LayerNorm"),
        Field("layernorm_epsilon",                 "norm_epsilon",        1e-5),
        Choice("activation_func",                  "hidden_act",          (("gelu_pytorch_tanh", "gelu_pytorch_tanh"),)),
        Fixed("gated_linear_unit",                 False),
        *biases("use_bias", "use_bias", "use_bias", default=True),
        SlidingWindow(),
        Rope(),
        TIED,
        Repeats("mlp_type",                        "default"),
        Repeats("norm_type",                       "layer_norm"),
        Unread("activation_function", "rms_norm_eps"),  # hidden_act and norm_epsilon are read instead
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), plain_mlp("mlp.c_fc", "mlp.c_proj"))),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "sliding_window": 12, "use_bias": True, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
