"""Fused weight gradients (wgrad): the matrix product adds to the gradient buffer itself, without a 16-bit gradient in between.

Replaces Apex's extension fused_weight_gradient_mlp_cuda where megatron/core/tensor_parallel/layers.py:49-53 did not find it and
:680-690 calls it, and the switches of its linears and of Transformer Engine's, which megatron-core sets from a config before
there is a buffer. megatron-core 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megabridge.platform import patches


class _Products:
    """Replaces Apex's extension fused_weight_gradient_mlp_cuda, which megatron-core's linears call (tensor_parallel/layers.py)."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
        """Adds gradients.T @ inputs, of [n, out] and [n, in], to `total` [out, in] in fp32."""
        if inputs.is_cuda and inputs.dtype is not total.dtype:
            torch.addmm(total, gradients.t(), inputs, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(gradients.t().to(total.dtype), inputs.to(total.dtype))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
    """The same for a buffer of 16 bits, which then has the inputs' dtype."""


def fuse_wgrad(chunks: Iterable[Any]) -> None:
    """Turns the fusion on for the linears, also Transformer Engine's, of chunks that are wrapped in DistributedDataParallel."""
    from megatron.core.tensor_parallel import layers

    patches.check_megatron(__name__)
    if not vars(layers)["_grad_accum_fusion_available"]:
        layers.fused_weight_gradient_mlp_cuda = _Products
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
            module.gradient_accumulation_fusion = True
        elif hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
