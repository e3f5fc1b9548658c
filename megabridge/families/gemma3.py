"""Gemma3ForCausalLM: Gemma 3, text only (transformers models/gemma3): two bases of the rotary embedding."""

from dataclasses import replace

from megabridge.families.core.fields import Field, Fixed, RequiredValue
from megabridge.families.core.parts import LAYER, embeddings, qk_norms, sizes
from megabridge.families.core.rope_and_windows import LayerRopes, SlidingWindow, every
from megabridge.families.gemma import GEMMA2, SANDWICH, SECOND
from megabridge.mapping import WeightMap, block

# fmt: off
FAMILY = replace(
    GEMMA2,
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    fields=(
        *sizes(kv=4, head=256, positions=131072),
        *SECOND,
        Fixed("qk_norm",                           "head"),
        RequiredValue("attn_logit_softcapping",             (None,)),
        Field("logits_softcap",                    "final_logit_softcapping", None),
        SlidingWindow(every("sliding_window_pattern", 6), default=4096,
                pattern_keys=("sliding_window_pattern", "_sliding_window_pattern")),
        LayerRopes(theta=(1e6, 1e4)),
    ),
    weights=WeightMap(embeddings(), block(*LAYER, *SANDWICH, qk_norms())),
    tiny={**{k: v for k, v in GEMMA2.tiny.items() if not k.endswith("softcapping")},
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
          "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
)
