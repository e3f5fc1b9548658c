"""ArceeForCausalLM: AFM (transformers models/arcee/modeling_arcee.py): Llama with an ungated squared-ReLU MLP."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Choice, Fixed
from megabridge.families.core.parts import LAYER, UNTIED, attention, biases, embeddings, plain_mlp, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="ArceeForCausalLM",
    model_type="arcee",
    fields=(
        *sizes(positions=4096),
        *rms(1e-5),
        Choice("activation_func",                  "hidden_act",          (("relu2", "relu2"),)),
        Fixed("gated_linear_unit",                 False),
        *biases("attention_bias", "attention_bias", "mlp_bias"),
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention(), plain_mlp())),
    tiny={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 256, "attention_bias": True, "mlp_bias": True,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    },
)
