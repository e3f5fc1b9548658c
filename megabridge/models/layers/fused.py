"""Element-wise functions that torch compiles into one kernel on CUDA; elsewhere they run uncompiled.

Casts round where they are written, as in uncompiled code: bf16 values don't depend on compilation. Backward passes are written out,
so that the same tensors are saved for them everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

import megabridge.platform as platform


def _compiled[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    if platform.is_cpu():
        return function
    return cast("Callable[P, T]", torch.compile(function, options={"emulate_precision_casts": True}))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, zero_centred: bool = False) -> Tensor:
    """x / rms(x) * weight over the last dimension: statistics in fp32, rounded to x's dtype before the weight is applied.

    With `zero_centred` the factor is 1 + weight, in fp32, and the result is rounded last. Saves x and one factor per row.
    """
    out: Tensor = _RMSNorm.apply(x, weight, epsilon, zero_centred)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, zero_centred: bool) -> Tensor:
        out, factor = _norm(x, weight, epsilon, zero_centred)
        ctx.save_for_backward(x, weight, factor)
        ctx.zero_centred = zero_centred
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, factor = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        of_x = _norm_of_x(gradient, x, weight, factor, ctx.zero_centred) if wants_x else None
        of_weight = _norm_of_weight(gradient, x, weight, factor, ctx.zero_centred) if wants_weight else None
        return of_x, of_weight, None, None


@_compiled
def _norm(x: Tensor, weight: Tensor, epsilon: float, zero_centred: bool) -> tuple[Tensor, Tensor]:
    values = x.float()
    factor = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    normed = values * factor
    if zero_centred:
        return (normed * (1.0 + weight.float())).to(x.dtype), factor
    return weight * normed.to(x.dtype), factor


@_compiled
def _norm_of_x(gradient: Tensor, x: Tensor, weight: Tensor, factor: Tensor, zero_centred: bool) -> Tensor:
    normed = x.float() * factor
    of_normed = gradient.float() * (1.0 + weight.float()) if zero_centred else (gradient * weight).float()
    return (factor * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))).to(x.dtype)


@_compiled
def _norm_of_weight(gradient: Tensor, x: Tensor, weight: Tensor, factor: Tensor, zero_centred: bool) -> Tensor:
    normed = x.float() * factor
    if not zero_centred:
        normed = normed.to(x.dtype).float()
    return (gradient.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates the first channels of every head of x, [s, b, heads, d], by `cosine` and `sine`, [s, 1, 1, rotated part of d].

    Channel i is paired with channel i + half the rotated part, or with `interleaved` with the next one.
    """
    out: Tensor = _Rotation.apply(x, cosine, sine, interleaved)
    return out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.interleaved = interleaved
        return _turned(x, cosine, sine, interleaved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, -sine, ctx.interleaved), None, None, None


@_compiled
def _turned(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    turned, kept = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    if interleaved:
        crossed = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        crossed = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cosine + crossed * sine, kept), dim=-1)


@_compiled
def row_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row of [n, columns], and the sum of exp(value - largest) over the row; both [n], fp32."""
    values = logits.float()
    largest = values.amax(-1)
    return largest, torch.exp(values - largest[:, None]).sum(-1)


@_compiled
def exponentiate_(logits: Tensor, largest: Tensor, factor: Tensor) -> None:
    """Replaces logits [n, columns] by factor * exp(logits - largest), computed in fp32; `largest` and `factor` are [n]."""
    logits.copy_(torch.exp(logits.float() - largest[:, None]) * factor[:, None])
