"""Norms that support sequence parallelism: RMSNorm and LayerNorm, zero-centred or not, and those of queries and keys.

RMSNorm computes statistics in fp32 and casts back before the weight is applied, as transformers' LlamaRMSNorm does; a zero-centred
one multiplies by 1 + weight in fp32 and casts last, as GemmaRMSNorm does. On a CPU the values are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megabridge.models.layers import fused, meta_kernels
from megabridge.models.layers.parameters import empty

from megatron.core import parallel_state


def _parameter(config: Any, size: int | tuple[int, ...], *, is_weight: bool) -> torch.nn.Parameter:
    """Makes a replicated parameter; under sequence parallelism megatron-core sums its gradient over the tp ranks.

    The attribute `sequence_parallel` is what megatron/core/distributed/finalize_model_grads.py looks for.
    """
    parameter = empty(config, *((size,) if isinstance(size, int) else size))
    torch.nn.init.constant_(parameter, 1.0 if is_weight and not config.layernorm_zero_centered_gamma else 0.0)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension. Takes the arguments of megatron-core's LayerNormBuilder."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma
        self.weight = _parameter(config, hidden_size, is_weight=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        if x.is_meta:
            return meta_kernels.norm(x, self.weight)
        return fused.rms_norm(x, self.weight, self.eps, zero_centred=self.zero_centred)


class LayerNorm(torch.nn.Module):
    """(x - mean) / std * weight + bias over the last dimension. Takes RMSNorm's arguments, and `bias`."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, bias: bool = True, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma
        self.weight = _parameter(config, hidden_size, is_weight=True)
        self.bias = _parameter(config, hidden_size, is_weight=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        weight = self.weight + 1 if self.zero_centred else self.weight
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class _Sum(torch.autograd.Function):
    """All-reduce over the tensor-parallel ranks, forward and backward: every rank's output depends on the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total


class HeadsNorm(torch.nn.Module):
    """Norm of queries or keys with a weight per head: over each head's width, or with `whole` over all heads at once.

    Every rank holds the weight of all heads, [heads * width] with `whole`, else [heads, width], and uses the rows of its heads. The
    gradient of the other rows is zero, and megatron-core sums the gradients of q_layernorm and k_layernorm over the ranks. With
    fewer key heads than ranks, several ranks hold the same head.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, *, heads: int, whole: bool) -> None:
        super().__init__()
        self.eps, self.heads, self.whole = eps, heads, whole
        self.rms_norm = config.normalization == "RMSNorm"
        self.weight = _parameter(config, heads * hidden_size if whole else (heads, hidden_size), is_weight=True)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]  # summed because of its name in any case

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads of this rank, width] to the same shape."""
        size = parallel_state.get_tensor_model_parallel_world_size()
        local, rank = x.shape[-2], parallel_state.get_tensor_model_parallel_rank()
        copies = local * size // self.heads  # ranks that hold the same head
        first = rank // copies * local
        weight = self.weight.view(self.heads, -1)[first : first + local]
        values = x.float()
        if not self.whole:
            normed = (
                F.rms_norm(values, values.shape[-1:], None, self.eps)
                if self.rms_norm
                else F.layer_norm(values, values.shape[-1:], eps=self.eps)
            )
            return (weight.float() * normed).to(x.dtype)
        squares = values.square().sum((-2, -1), keepdim=True)
        if size > 1:
            squares = _Sum.apply(squares) / copies
        normed = values * torch.rsqrt(squares / self.weight.numel() + self.eps)
        return weight * normed.to(x.dtype)
