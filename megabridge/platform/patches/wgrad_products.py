"""Weight gradients that the matrix product itself adds to the buffer of gradients: neither made in 16 bits, nor added after.

Stands for Apex's extension fused_weight_gradient_mlp_cuda where megatron/core/tensor_parallel/layers.py:49-53 did not find it and
:680-690 calls it, and for the switches of its linears and of Transformer Engine's, which megatron-core sets from a config before
there is a buffer. megatron-core 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megabridge.platform import patches


class _Products:
    """Stands for the extension of that name of Apex, for which megatron-core's linears call (tensor_parallel/layers.py)."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
        """Adds gradients.T @ inputs, of [n, out] and [n, in], to `total` [out, in] in fp32."""
        if inputs.is_cuda and inputs.dtype is not total.dtype:
            torch.addmm(total, gradients.t(), inputs, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(gradients.t().to(total.dtype), inputs.to(total.dtype))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
    """The same for a buffer of 16 bits, which is then of the inputs' type."""


def fuse_wgrad(chunks: Iterable[Any]) -> None:
    """Lets the linears of chunks that are wrapped in DistributedDataParallel, also Transformer Engine's, add in place."""
    from megatron.core.tensor_parallel import layers

    patches.check_megatron(__name__)
    if not vars(layers)["_grad_accum_fusion_available"]:
        layers.fused_weight_gradient_mlp_cuda = _Products
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
            module.gradient_accumulation_fusion = True
        elif hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
