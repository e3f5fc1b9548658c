"""Gradient norm, clipping and the optimizer's step, without waiting for the device.

megatron-core's own `optimizer.step()` reads the norm on the host at every step where Transformer Engine is not installed
(optimizer/clip_grads.py), and gives no chance to check it before the parameters change. Here the norm stays a tensor. Only FP16
waits, to find out whether gradients overflowed.
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
    """Computes the norm of all gradients of all ranks, a float32 scalar on the device; unscales the gradients.

    None where FP16 gradients overflowed: the loss scale has been adapted, and the step must be skipped. Every rank calls it.
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
    """Clips the gradients of norm `norm` to `clip` (0: no clipping), and updates the parameters. Every rank calls it."""
    if clip > 0:
        coefficient = (clip / (norm + 1e-6)).clamp(max=1.0)
        for part in _chain(optimizer):
            gradients = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient)
    return bool(optimizer.step_with_ready_grads())


def norm_for_policy(norm: torch.Tensor | None, scale: torch.Tensor, *, least_scale: float) -> float:
    """The norm for the policy. If FP16 gradients overflowed (None): infinite at the smallest loss scale, else 0."""
    if norm is not None:
        return float(norm)
    return math.inf if float(scale) <= least_scale else 0.0


def loss_scale(optimizer: Any) -> torch.Tensor:
    """The loss scale of the next step, on the device; 1 except in FP16."""
    scale: torch.Tensor = optimizer.get_loss_scale()
    return scale


def _chain(optimizer: Any) -> list[Any]:
    """The optimizers of a chain (dense parameters, experts), with those that have no local parameters: all take part in sums."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]
