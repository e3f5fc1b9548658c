"""Sets the attention factor of a layer, and the rotary embedding of multi-latent attention, from Hugging Face's settings.

Replaces `_yarn_concentration_factor` of megatron/core/transformer/attention.py:326, computed from config.yarn_* attributes, which
can't express every attention_factor and are the same for all layers; and `rotary_pos_emb` of multi_latent_attention.py:182-190.
megatron-core 0.19.
"""

from __future__ import annotations

from typing import Any

from megabridge.platform import patches


def set_factor(attention: Any, factor: float) -> None:
    """Sets the attention factor of one layer's self-attention."""
    patches.check_megatron(__name__)
    attention._yarn_concentration_factor = factor


def set_embedding(attention: Any, embedding: Any) -> None:
    """Sets the rotary embedding of one layer's multi-latent attention, a module that returns (angles, factor)."""
    patches.check_megatron(__name__)
    attention.rotary_pos_emb = embedding
