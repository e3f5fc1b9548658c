"""MixtralForCausalLM: Mixtral 8x7B and 8x22B (transformers models/mixtral)."""

from megabridge.families.core.family import Family
from megabridge.families.core.fields import Fixed
from megabridge.families.core.moe import experts, mixture, router
from megabridge.families.core.parts import GATED_SILU, LAYER, UNTIED, attention, embeddings, pre_norms, rms, sizes
from megabridge.families.core.rope_and_windows import Rope, SlidingWindow
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    fields=(
        *sizes(kv=8, positions=131072),
        *rms(1e-5),
        *GATED_SILU,
        *mixture(experts="num_local_experts", width="intermediate_size", defaults=(8, 2, 14336)),
        Fixed("moe_router_score_function",         "softmax"),  # over the chosen experts alone
        SlidingWindow(),
        Rope(1e6),
        UNTIED,
    ),
    weights=WeightMap(embeddings(), block(
        *LAYER, pre_norms(), attention(), router("block_sparse_moe.gate"),
        experts(*(f"block_sparse_moe.experts.{{expert}}.{name}" for name in ("w1", "w3", "w2"))),
    )),
    tiny={
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 131, "max_position_embeddings": 256, "num_local_experts": 8, "num_experts_per_tok": 2,
        "tie_word_embeddings": False, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
)
