"""LayerOptions: features of Hugging Face decoders for which megatron-core's TransformerConfig has no setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final, Literal


@dataclass(frozen=True)
class LayerOptions:
    """Differences of an architecture's layers from a plain pre-norm decoder. Each field is a provider setting of the same name."""

    add_attn_proj_bias: bool = False
    """Whether the attention's output projection has a bias; megatron-core's add_bias_linear sets it together with the MLP's."""
    add_mlp_bias: bool = False
    """Whether the MLP's linears have biases."""
    norm_bias: bool = True
    """Whether LayerNorms have a bias."""
    pre_norm: bool = True
    """Whether the input of attention and MLP is normalised."""
    post_norm: bool = False
    """Whether the output of attention and MLP is normalised before it is added."""
    parallel_residual: Literal["shared", "separate"] | None = None
    """Whether attention and MLP both read the layer's input: through one norm (shared) or one each (separate)."""
    residual_multiplier: float = 1.0
    """Factor of the outputs of attention and MLP before they are added."""
    embedding_multiplier: float = 1.0
    """Factor of the embeddings."""
    round_embedding_multiplier: bool = False
    """Whether embedding_multiplier is first rounded to the parameters' dtype."""
    logits_multiplier: float = 1.0
    """Factor of the logits."""
    logits_softcap: float | None = None
    """c in c * tanh(logits / c)."""
    attention_softcap: float | None = None
    """c in c * tanh(scores / c), for attention scores before the mask."""
    qk_norm: Literal["head", "heads", "whole", "rotated", "l2"] | None = None
    """Norms of queries and keys. head: over one head's width, one weight for all heads. heads: the same with a weight per head.
    whole: over all heads at once. rotated: as head, after the rotary embedding. l2: over one head's width without a weight, in
    layers with a rotary embedding."""
    qk_norm_bias: bool = True
    """Whether LayerNorms of queries and keys have a bias."""
    qk_norm_epsilon: float | None = None
    """Epsilon of the norms of latent queries and keys; None: layernorm_epsilon."""
    local_rope: dict[str, Any] | None = None
    """Rotary settings of layers with a window, where they differ from the others'."""
    query_temperature: tuple[float, int, int] | None = None
    """(b, n, k): the query at position p is multiplied by 1 + b * log(1 + floor((p + k) / n)), in layers without a rotary embedding
    where no_rope_freq says which have one."""
    attention_chunks: bool = False
    """Whether a query sees the keys of its own chunk, which is as long as the window, up to itself, instead of its last keys."""
    output_bias: bool = False
    """Whether the output layer has a bias."""
    learned_positions: bool = False
    """Whether positions have a learned embedding, a table of `seq_length` rows."""

    router_normalize: bool | None = None
    """Whether the weights of a token's experts are divided by their sum. None: for sigmoid scores only, as in megatron-core."""
    router_epsilon: float = 1e-20
    """Lower bound of that sum."""
    router_group_score: Literal["top2", "max"] | None = None
    """The score of a group of experts: the sum of its two best scores, or its best one. None: as in megatron-core, the sum of its
    moe_router_topk / moe_router_group_topk best."""
    router_bias: bool = False
    """Whether a correction bias is added to the scores that choose experts, also where they are a softmax."""
    router_jitter: float = 0.0
    """For SparseMixer: experts whose score is below the best by more than twice this share of it are left out of the softmax."""
    router: str | None = None
    """Router of the architecture's own as package.module:Class, a subclass of megabridge.models.layers.router.Router."""

    core_attention: str | None = None
    """Core attention of the architecture's own as package.module:Class. It takes the constructor arguments of
    megabridge.models.layers.attention.TorchAttention, and is usually a subclass."""

    @classmethod
    def of(cls, get: Callable[[str], Any]) -> LayerOptions:
        """Returns the options in a provider's settings; `get` reads one setting."""
        return cls(**{name: get(name) for name in DEFAULTS})

    def torch_only(self) -> list[str]:
        """Names of the options that only backend=torch supports and that are not at their defaults."""
        changed = [name for name, value in DEFAULTS.items() if self.__dict__[name] != value]
        return [name for name in changed if name not in _EVERY_BACKEND and (name, self.__dict__[name]) != ("qk_norm", "head")]


DEFAULTS: Final[dict[str, Any]] = {field.name: field.default for field in fields(LayerOptions)}
# Implemented by CausalLM around the layers, or by the layers of every backend.
_EVERY_BACKEND: Final = frozenset(
    "add_attn_proj_bias add_mlp_bias embedding_multiplier round_embedding_multiplier logits_multiplier logits_softcap "
    "residual_multiplier learned_positions output_bias".split()
)
