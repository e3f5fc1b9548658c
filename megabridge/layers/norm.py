"""RMSNorm and LayerNorm that allow sequence parallelism.

Statistics are taken in fp32 and the result is cast back before the weight is applied, as transformers'
LlamaRMSNorm does: bf16 values are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import megabridge.platform as platform


def _parameter(config: Any, size: int, value: float) -> torch.nn.Parameter:
    """A replicated parameter; under sequence parallelism megatron-core sums its gradient over the tp ranks.

    The attribute `sequence_parallel` is what megatron/core/distributed/finalize_model_grads.py looks for.
    """
    device = None if config.use_cpu_initialization else platform.device()  # None: a surrounding torch.device() holds
    parameter = torch.nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension. Builds with the arguments of megatron-core's LayerNormBuilder."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        # Without a weight torch's kernel computes in fp32 and casts its result to x's dtype.
        return self.weight * F.rms_norm(x, self.weight.shape, None, self.eps)


class LayerNorm(torch.nn.Module):
    """(x - mean) / std * weight + bias over the last dimension; the arguments are RMSNorm's."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)
        self.bias = _parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
