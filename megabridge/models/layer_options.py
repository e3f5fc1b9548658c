"""Layer options: what Hugging Face decoders do that megatron-core's TransformerConfig has no word for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final, Literal


@dataclass(frozen=True)
class LayerOptions:
    """How the layers of one architecture differ from a plain pre-norm decoder. Each field is a provider setting of that name."""

    add_attn_proj_bias: bool = False
    """Whether the attention's output projection has a bias. megatron-core's add_bias_linear couples it with the MLP's."""
    add_mlp_bias: bool = False
    """Whether the MLP's linears have biases."""
    norm_bias: bool = True
    """Whether LayerNorms have a bias."""
    pre_norm: bool = True
    """Whether the input of attention and MLP is normalised."""
    post_norm: bool = False
    """Whether the output of attention and MLP is normalised before it is added."""
    parallel_residual: Literal["shared", "separate"] | None = None
    """Attention and MLP both read the layer's input: through one norm (shared), or one each (separate)."""
    residual_multiplier: float = 1.0
    """What the output of attention and MLP is multiplied by before it is added."""
    embedding_multiplier: float = 1.0
    """What embeddings are multiplied by."""
    round_embedding_multiplier: bool = False
    """Whether that factor is rounded to the parameters' dtype first."""
    logits_multiplier: float = 1.0
    """What logits are multiplied by."""
    logits_softcap: float | None = None
    """c in c * tanh(logits / c)."""
    attention_softcap: float | None = None
    """c in c * tanh(scores / c), of attention scores before the mask."""
    qk_norm: Literal["head", "heads", "whole", "rotated", "l2"] | None = None
    """Norms of queries and keys. head: over one head's width, one weight for all heads. heads: the same with a weight per head.
    whole: over all heads at once. rotated: as head, after the rotary embedding. l2: over one head's width without a weight, in
    layers with a rotary embedding."""
    qk_norm_bias: bool = True
    """Whether LayerNorms of queries and keys have a bias."""
    qk_norm_epsilon: float | None = None
    """What norms of latent queries and keys add to the variance; None: layernorm_epsilon."""
    local_rope: dict[str, Any] | None = None
    """Rotary settings of layers with a window, where they differ from the others'."""
    query_temperature: tuple[float, int, int] | None = None
    """(b, n, k): the query at position p is multiplied by 1 + b * log(1 + floor((p + k) / n)), in layers without a rotary embedding
    where no_rope_freq says which have one."""
    attention_chunks: bool = False
    """Whether a window is the part of a query's own chunk up to it, chunks being as long as windows, and not its last keys."""
    output_bias: bool = False
    """Whether the output layer has a bias."""
    learned_positions: bool = False
    """Whether positions are embedded by a table of `seq_length` rows."""

    router_normalize: bool | None = None
    """Whether the weights of a token's experts are divided by their sum. None: as megatron-core has it, for sigmoid scores."""
    router_epsilon: float = 1e-20
    """The least sum to divide by."""
    router_group_score: Literal["top2", "max"] | None = None
    """What groups of experts are compared by: the sum of their two best scores, or their best one. None: as megatron-core has it,
    the sum of as many as a token takes out of one group."""
    router_bias: bool = False
    """Whether a correction bias is added to the scores that choose experts, also where they are a softmax."""
    router_jitter: float = 0.0
    """A sparse mixer's: experts whose score is below the best by more than twice this share of it have no part in the softmax."""
    router: str | None = None
    """package.module:Class of a router of the architecture's own, a subclass of megabridge.models.layers.router.Router."""

    core_attention: str | None = None
    """package.module:Class of a core attention of the architecture's own, made as megabridge.models.layers.attention.TorchAttention
    is; a subclass of that needs to say only what differs."""

    @classmethod
    def of(cls, get: Callable[[str], Any]) -> LayerOptions:
        """The style that a provider's settings ask for; `get` reads one."""
        return cls(**{name: get(name) for name in DEFAULTS})

    def special(self) -> list[str]:
        """The settings that only backend=torch has, where they are not at their defaults."""
        changed = [name for name, value in DEFAULTS.items() if self.__dict__[name] != value]
        return [name for name in changed if name not in _EVERY_BACKEND and (name, self.__dict__[name]) != ("qk_norm", "head")]


DEFAULTS: Final[dict[str, Any]] = {field.name: field.default for field in fields(LayerOptions)}
# What the model around the layers does, or every backend's layers do.
_EVERY_BACKEND: Final = frozenset(
    "add_attn_proj_bias add_mlp_bias embedding_multiplier round_embedding_multiplier logits_multiplier logits_softcap "
    "residual_multiplier learned_positions output_bias".split()
)
