"""Gradient norm, clipping and the optimizer's step, without waiting for the device.

megatron-core's own `optimizer.step()` reads the norm on the host where Transformer Engine is not installed
(optimizer/clip_grads.py), at every step, and leaves no place to look at it before the parameters change. Here the norm stays
a tensor. Only FP16 waits, for whether its gradients overflowed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

import megabridge.platform as platform

from megatron.core.optimizer import ChainedOptimizer


@torch.no_grad()
def gradient_norm(optimizer: Any) -> torch.Tensor | None:
    """The norm of all gradients of all ranks, a float32 scalar on the device; gradients are unscaled and ready after it.

    None where FP16 gradients overflowed: the loss scale has been adapted, and the step is not to be taken. Every rank calls it.
    """
    if optimizer.prepare_grads():
        return None
    total = torch.zeros((), dtype=torch.float32, device=platform.device())
    for part in _chain(optimizer):
        gradients = part.get_grads_for_grad_norm()
        square = torch.zeros_like(total)
        if gradients:
            square += torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)).square().sum()
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        total += square
    return total.sqrt()


@torch.no_grad()
def optimizer_step(optimizer: Any, norm: torch.Tensor, *, clip: float) -> bool:
    """Clips the gradients to `clip` (0: not at all) by their `norm`, and updates the parameters. Every rank calls it."""
    if clip > 0:
        coefficient = (clip / (norm + 1e-6)).clamp(max=1.0)
        for part in _chain(optimizer):
            gradients = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient)
    return bool(optimizer.step_with_ready_grads())


def size_of(norm: torch.Tensor | None, scale: torch.Tensor, *, least_scale: float) -> float:
    """The norm as the policy sees it. Where FP16 gradients overflowed: infinite if the scale was the least, else 0."""
    if norm is not None:
        return float(norm)
    return math.inf if float(scale) <= least_scale else 0.0


def loss_scale(optimizer: Any) -> torch.Tensor:
    """What the next step's loss is multiplied by, on the device: 1 but for FP16."""
    scale: torch.Tensor = optimizer.get_loss_scale()
    return scale


def _chain(optimizer: Any) -> list[Any]:
    """The optimizers of a chain (dense parameters, experts), those without parameters here included: all take part in sums."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]
