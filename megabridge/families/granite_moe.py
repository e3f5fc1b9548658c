"""GraniteMoeForCausalLM: Granite 3 with experts (transformers models/granitemoe): Granite's multipliers, stacked experts."""

from megabridge.families.core.family import Family, Parameters
from megabridge.families.core.fields import Fixed
from megabridge.families.core.moe import EXPERTS, mixture, router
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, biases, embeddings, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope
from megabridge.families.granite import FACTORS
from megabridge.mapping import Stack, WeightMap, block, weight

# fmt: off
FAMILY = Family(
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    fields=(
        *sizes(),
        *rms(),
        *GATED_SILU,
        *biases("attention_bias", "attention_bias"),
        *FACTORS,
        *mixture(experts="num_local_experts", width="intermediate_size", defaults=(8, 2, 11008)),
        Fixed("moe_router_score_function",         "softmax"),  # over the chosen experts alone
        Rope(),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), router("block_sparse_moe.router.layer"),
        weight("mlp.experts.linear_fc1.weight",    "block_sparse_moe.input_linear.weight",  layout=Stack(EXPERTS)),
        weight("mlp.experts.linear_fc2.weight",    "block_sparse_moe.output_linear.weight", layout=Stack(EXPERTS)),
    )),
    parameters=Parameters(is_transposed=False, names=(
        ("input_linear.weight", "experts.gate_up_proj"), ("output_linear.weight", "experts.down_proj"),
    )),
    tiny={
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.03, "logits_scaling": 5.0, "attention_bias": True, "tie_word_embeddings": True,
        "num_local_experts": 8, "num_experts_per_tok": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
