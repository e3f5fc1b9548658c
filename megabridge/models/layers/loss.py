"""Cross-entropy of logits whose columns, the vocabulary, are cut over the tensor-parallel ranks.

Nothing of the logits' size is made beside them: sums are taken in fp32 as they are read, and the backward pass writes their
gradient over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from megabridge.models.layers import fused

_PIECE: Final = 2**20
"""Logits of a piece where no kernel is compiled: what is made of them stays in a cache."""


def cross_entropy(logits: Tensor, labels: Tensor, group: Any) -> Tensor:
    """The loss of each token, fp32 [..]: `logits` [.., columns of this rank of `group`], `labels` [..], the same on its ranks.

    A label that is none of the columns counts as a logit equal to the largest. The backward pass can be taken once, and logits are
    their gradient after it. Every rank of the group calls it.
    """
    columns = labels.reshape(-1) - group.rank() * logits.shape[-1]
    losses: Tensor = _CrossEntropy.apply(logits, columns.where((columns >= 0) & (columns < logits.shape[-1]), -1), group)
    return losses.view_as(labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, group: Any) -> Tensor:
        """logits [.., V], columns [n] with -1 for a label of another rank, to losses [n]."""
        rows = logits.reshape(-1, logits.shape[-1])
        sums = [fused.row_sums(piece) for (piece,) in _pieces(rows)]
        largest, total = (torch.cat(parts) for parts in zip(*sums, strict=True))
        if group.size() > 1:
            own = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            total = total * torch.exp(own - largest)
        wanted = torch.where(columns < 0, 0.0, _of_columns(rows, columns) - largest)
        if group.size() > 1:
            both = torch.stack([total, wanted])
            dist.all_reduce(both, group=group)
            total, wanted = both.unbind()
        ctx.save_for_backward(logits, columns, largest, total)
        return torch.log(total) - wanted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Of a logit: (its share of the softmax, less 1 for the label) times the gradient of the row's loss."""
        logits, columns, largest, total = ctx.saved_tensors
        rows = logits.reshape(-1, logits.shape[-1])
        factor = gradient.float() / total
        of_label = torch.exp(_of_columns(rows, columns) - largest) * factor - gradient.where(columns >= 0, 0.0)
        for piece, *row in _pieces(rows, largest, factor):
            fused.exponentiate_(piece, *row)
        rows.scatter_(1, columns.clamp(min=0)[:, None], of_label.to(rows.dtype)[:, None])
        return rows.view_as(logits), None, None


def _of_columns(rows: Tensor, columns: Tensor) -> Tensor:
    """The value of each row of [n, V] in its column, fp32 [n]; of the first one for -1."""
    return rows.gather(1, columns.clamp(min=0)[:, None])[:, 0].float()


def _pieces(rows: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`rows` [n, V] and what goes with each, [n], in pieces of whole rows; on CUDA at once."""
    count = max(1, rows.shape[0] if rows.is_cuda else _PIECE // rows.shape[1])
    return zip(*(torch.split(tensor, count) for tensor in (rows, *more)), strict=True)
