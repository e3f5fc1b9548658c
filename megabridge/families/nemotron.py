"""NemotronForCausalLM: Nemotron 3 8B, 4 15B and 340B, Minitron (transformers models/nemotron): squared ReLU, LayerNorm1P."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Field, Fixed
from megabridge.families.core.parts import LAYER, UNTIED, attention, biases, embeddings, plain_mlp, pre_norms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    fields=(
        *sizes(positions=4096, std=0.0134),
        Fixed("normalization",                     "LayerNorm"),
        Fixed("layernorm_zero_centered_gamma",     True),
        Field("layernorm_epsilon",                 "norm_eps",            1e-5),
        Choice("activation_func",                  "hidden_act",          (("relu2", "relu2"),)),
        Fixed("gated_linear_unit",                 False),
        *biases("attention_bias", "attention_bias", "mlp_bias"),
        Rope(partial=0.5),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), plain_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "mlp_bias": True,
        "hidden_act": "relu2", "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
)
