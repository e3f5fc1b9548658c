"""Core attention by torch's scaled_dot_product_attention: O(s) memory, grouped queries, any device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import Any, Final, override

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from megabridge.errors import ConfigError
from megabridge.models.layer_options import LayerOptions
from megabridge.models.layers import flex, fused, meta_kernels
from megabridge.models.layers.norm import LayerNorm, RMSNorm
from megabridge.models.layers.packed import Packed
from megabridge.models.layers.parameters import empty

from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

_PLAIN: Final = LayerOptions()


class TorchAttention(torch.nn.Module):
    """The `core_attention` of megatron-core's Attention; takes the arguments of CoreAttentionBuilder.

    Under multi-latent attention key and value heads have widths of their own, `k_channels` and `v_channels`. With
    softmax_type=learnable every head has a sink: an extra score in the softmax, with no value.
    """

    softmax_offset: torch.nn.Parameter | None

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        *,
        pg_collection: Any = None,
        options: LayerOptions = _PLAIN,
        **_: object,
    ) -> None:
        super().__init__()
        self.options = options
        self.tp_group = None if pg_collection is None else pg_collection.tp
        self.softmax_offset = _sinks(config) if config.softmax_type == "learnable" else None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # keys that a query sees, its own included
        self.has_rope = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        self.has_temperature = options.query_temperature is not None and not (config.no_rope_freq and self.has_rope)
        self.epsilon = config.layernorm_epsilon
        if options.qk_norm == "rotated":
            norm: Any = RMSNorm if config.normalization == "RMSNorm" else functools.partial(LayerNorm, bias=options.qk_norm_bias)
            self.q_layernorm = norm(config, config.kv_channels, config.layernorm_epsilon)
            self.k_layernorm = norm(config, config.kv_channels, config.layernorm_epsilon)
        self.attn_mask_type = attn_mask_type
        self.sequence_parallel = config.sequence_parallel
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1 / math.sqrt(k_channels or config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of this rank's query [s, b, heads, d], key and value [s, b, kv_heads, d]; returns [s, b, heads * d].

        `attention_mask` is boolean, True where attention is not allowed, as in megatron-core: None with a causal mask
        type means causal; [b, 1, 1, s] masks keys (padding) in addition to the causal mask; [b, 1, s, s] is the whole mask. The
        result of a query that may attend to nothing is zero. With `packed_seq_params`, a Packed, the tensors are
        [t, heads, d], a query sees its own document only, and the result is [t, 1, heads * d].
        """
        if attention_bias is not None:
            raise ConfigError("backend=torch has no attention bias; set none, or use backend=te.")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        query, key = self._normed(query, key, None)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if query.is_meta:
            return meta_kernels.attention(query, key, value)
        dropout = self.dropout if self.training else 0.0
        window = self.window if self.window is not None and self.window < key.shape[2] else None
        is_eager = self.options.attention_softcap is not None or self.softmax_offset is not None
        is_special = window is not None or is_eager
        if is_special and causal and attention_mask is None and flex.can_take(query, dropout=dropout):
            mask = flex.causal_mask(query.shape[-2], window, query.device, chunks=self.options.attention_chunks)
            return self._by_flex(query, key, value, mask)
        allowed = None
        if is_special or attention_mask is not None:
            allowed = _allowed(attention_mask, key, window, causal=causal, chunks=self.options.attention_chunks)
        # Heads are sharded over tp, so each rank needs its own dropout mask; under sequence parallelism megatron-core uses
        # the default generator here (transformer/dot_product_attention.py).
        forked = dropout > 0 and not self.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forked else contextlib.nullcontext():
            attend = self._eager if is_eager else _kernel
            context = attend(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=causal and allowed is None,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        """Attention of [t, heads, d] to [t, 1, heads * d]: in one kernel where flex takes it, otherwise document by document."""
        if not flex.can_take(query.transpose(0, 1), dropout=self.dropout if self.training else 0.0):
            documents = itertools.pairwise(packed.bounds)
            parts = [self(*(tensor[begin:end, None] for tensor in (query, key, value)), None) for begin, end in documents]
            return torch.cat(parts)
        query, key, value = (tensor[:, None] for tensor in (query, key, value))
        query, key = self._normed(query, key, packed.positions)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return self._by_flex(query, key, value, packed.mask(self.window, chunks=self.options.attention_chunks))

    def _normed(self, query: Tensor, key: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Applies the norms after the rotary embedding, and the query temperature, to [s, b, heads, d].

        `positions` [s] are 0 to s - 1 by default.
        """
        if self.options.qk_norm == "rotated":
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.options.qk_norm == "l2" and self.has_rope:
            query, key = (
                F.rms_norm(tensor.float(), tensor.shape[-1:], eps=self.epsilon).to(tensor.dtype) for tensor in (query, key)
            )
        if self.has_temperature and self.options.query_temperature is not None:
            query = query * _temperature(*self.options.query_temperature, query, positions)
        return query, key

    def _by_flex(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        """Flex attention of [b, heads, s, d] to [s, b, heads * d]."""
        settings = {"softcap": self.options.attention_softcap, "scale": self.scale, "sinks": self.softmax_offset}
        context = flex.attend(query, key, value, mask=mask, **settings)  # type: ignore[arg-type]  # each has its own type
        return context.permute(2, 0, 1, 3).flatten(2)

    def _eager(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
        enable_gqa: bool,
    ) -> Tensor:
        """Attention with capped scores or sinks, which torch's kernels lack. Memory grows with the square of the length."""
        assert not is_causal
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.transpose(-2, -1) * scale
        if (cap := self.options.attention_softcap) is not None:
            scores = torch.tanh(scores / cap) * cap
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.to(scores.dtype)[None, :, None, None]
            scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32)[..., : key.shape[-2]].to(query.dtype)
        return F.dropout(weights, dropout_p) @ value

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> dict[str, Any]:
        """Returns sharded tensors as in megatron-core: sinks are sharded over tp, norms are replicated."""
        out: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return out


def _kernel(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """torch's attention; on Hopper and later cuDNN's where possible, which takes less than two thirds of flash attention's time.

    The order of kernels is set here because importing Transformer Engine changes torch's.
    """
    if not (query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)):
        return F.scaled_dot_product_attention(query, key, value, **settings)
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, **settings)


def _sinks(config: Any) -> torch.nn.Parameter:
    """Makes the sinks [heads of this rank]."""
    sinks = empty(config, config.num_attention_heads // config.tensor_model_parallel_size)
    if config.perform_initialization:
        with contextlib.nullcontext() if sinks.is_meta else tensor_parallel.get_cuda_rng_tracker().fork():
            config.init_method(sinks)
    return sinks


def _allowed(mask: Tensor | None, key: Tensor, window: int | None, *, causal: bool, chunks: bool) -> Tensor | None:
    """True where a query may attend to one of the keys [b, heads, s, d]; [s, s] or [b, 1, s, s], None for all.

    A whole mask [b, 1, s, s] is combined with the causal one only where there is a window.
    """
    allowed = None if mask is None else ~mask
    if window is None and not (causal and (allowed is None or allowed.shape[-2] == 1)):
        return allowed
    seen = _seen(key.shape[-2], window, key.device, chunks=chunks)
    return seen if allowed is None else allowed & seen


@functools.lru_cache(maxsize=4)
def _seen(length: int, window: int | None, device: torch.device, *, chunks: bool) -> Tensor:
    """[length, length], True where the key (column) is not after the query (row), and is one of its last `window` keys, or with
    `chunks`, in the same chunk of `window` positions."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    if chunks and window is not None:
        chunk = positions // window
        return (distance >= 0) & (chunk[:, None] == chunk[None, :])
    return (distance >= 0) & (distance < (length if window is None else window))


def _temperature(beta: float, original: int, first: int, query: Tensor, positions: Tensor | None = None) -> Tensor:
    """The factor [s, 1, 1, 1] of queries at `positions` [s], by default 0 to s - 1; `first` is added to each position."""
    if positions is None:
        positions = torch.arange(query.shape[0], device=query.device)
    positions = positions + first
    factor = 1 + beta * torch.log(1 + torch.floor(positions / original))
    return factor[:, None, None, None].to(query.dtype)


class TorchSelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention, with queries and keys rotated in one kernel, right after the projection.

    In a model with two rotary embeddings it takes the angles for its kind of layer (see LocalAndGlobal).
    """

    _angles: Tensor | None = None
    """Rotary angles of the current forward pass."""

    @override
    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        if rotary_pos_emb is not None and rotary_pos_emb.dim() == 5:
            windowed = is_layer_window_attention(self.config.window_size, self.config.window_attn_skip_freq, self.layer_number)
            rotary_pos_emb = rotary_pos_emb[int(windowed)]
        if kwargs.get("inference_context") is not None:  # keys are cached there after they were rotated
            return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        has_rope = not (self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1])
        self._angles = rotary_pos_emb if has_rope else None
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._angles = None

    @override
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Queries [s, b, heads, d], keys and values [s, b, kv_heads, d] of this rank, and an output gate if there is one."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is None:
            return query, key, *others
        cosine, sine = ((turn(self._angles) * self._yarn_concentration_factor).to(query.dtype) for turn in (torch.cos, torch.sin))
        query, key = (fused.rotate(tensor, cosine, sine, interleaved=self.config.rotary_interleaved) for tensor in (query, key))
        return query, key, *others
