"""Layers on meta tensors: shapes and saved activations without computation, for estimates of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, override

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MetaKernels(TorchFunctionMode):
    """Creates tensors on the meta device where megatron-core names a device during a pass; replaces F.rms_norm by `norm`."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if func is F.rms_norm:
            return norm(args[0])
        return func(*args, **kwargs)


class _Norm(torch.autograd.Function):
    """Saves what a one-kernel RMSNorm saves: its input, and a factor per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """RMSNorm of [.., width] to the same shape."""
    out: Tensor = _Norm.apply(x, weight)
    return out


class _Attention(torch.autograd.Function):
    """Saves what flash and flex attention save: queries, keys, values, the result, and an fp32 log-sum-exp per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(length, batch, heads, value.shape[-1]).permute(1, 2, 0, 3)  # in the queries' order, as kernels do
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of query [b, heads, s, d], key and value [b, kv_heads, s, d or wider] to [s, b, heads * width of a value]."""
    out: Tensor = _Attention.apply(query, key, value)
    return out.permute(2, 0, 1, 3).flatten(2)


class EvenDispatcher:
    """A token dispatcher for MoELayer that gives every expert the same number of tokens, with the methods of megatron-core's
    MoETokenDispatcher. Under expert tensor parallelism a rank gets the tokens of its `etp` ranks."""

    def __init__(self, config: Any, *, experts: int, etp: int) -> None:
        self.config, self.experts, self.etp = config, experts, etp

    def dispatch_preprocess(self, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Copies hidden [.., h] and probs [tokens, all experts] into one row for each expert that a token goes to."""
        self._shape = hidden.shape
        tokens = hidden.reshape(-1, hidden.shape[-1])
        self._places = torch.empty(tokens.shape[0] * self.config.moe_router_topk, dtype=torch.long, device=hidden.device)
        return tokens.index_select(0, self._places), probs.reshape(-1).index_select(0, self._places)

    def token_dispatch(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for this rank's experts: as many as it sends, times `etp`."""
        return rows.repeat(self.etp, 1), probs.repeat(self.etp)

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows, the number of rows of each expert, and their probabilities."""
        each, more = divmod(rows.shape[0], self.experts)
        counts = torch.tensor([each + (number < more) for number in range(self.experts)])
        return rows, counts, probs

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        return None, None

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        return rows

    def token_combine(self, rows: Tensor) -> Tensor:
        return rows[: self._places.shape[0]]

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        """Sums the rows of each token."""
        tokens = rows.new_zeros(self._shape).reshape(-1, rows.shape[-1])
        return tokens.index_add(0, self._places, rows).reshape(self._shape)
