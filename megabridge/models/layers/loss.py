"""Vocabulary-parallel cross-entropy: the columns of the logits are sharded over the tensor-parallel ranks.

No second tensor of the logits' size is allocated: sums are taken in fp32 as logits are read, and the backward pass overwrites them
with their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from megabridge.models.layers import fused

_PIECE: Final = 2**20
"""Logits per piece on the CPU, where nothing is compiled: intermediate values stay in the cache."""


def cross_entropy(logits: Tensor, labels: Tensor, group: Any) -> Tensor:
    """The loss of each token, fp32 [..], of `logits` [.., this rank's columns] and `labels` [..], the same on all ranks of `group`.

    A label outside the vocabulary counts as a logit equal to the largest. The backward pass can run once; after it `logits` holds
    the gradient. Every rank of the group calls it.
    """
    columns = labels.reshape(-1) - group.rank() * logits.shape[-1]
    losses: Tensor = _CrossEntropy.apply(logits, columns.where((columns >= 0) & (columns < logits.shape[-1]), -1), group)
    return losses.view_as(labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, group: Any) -> Tensor:
        """Losses [n] of logits [.., V] and columns [n], which are -1 for a label of another rank."""
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
        """The gradient of a logit: (its probability, minus 1 for the label) times the gradient of the row's loss."""
        logits, columns, largest, total = ctx.saved_tensors
        rows = logits.reshape(-1, logits.shape[-1])
        factor = gradient.float() / total
        of_label = torch.exp(_of_columns(rows, columns) - largest) * factor - gradient.where(columns >= 0, 0.0)
        for piece, *row in _pieces(rows, largest, factor):
            fused.exponentiate_(piece, *row)
        rows.scatter_(1, columns.clamp(min=0)[:, None], of_label.to(rows.dtype)[:, None])
        return rows.view_as(logits), None, None


def _of_columns(rows: Tensor, columns: Tensor) -> Tensor:
    """The value of each row of [n, V] in its column, fp32 [n]; in the first column for -1."""
    return rows.gather(1, columns.clamp(min=0)[:, None])[:, 0].float()


def _pieces(rows: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits `rows` [n, V] and further tensors [n] into pieces of whole rows; on CUDA one piece."""
    count = max(1, rows.shape[0] if rows.is_cuda else _PIECE // rows.shape[1])
    return zip(*(torch.split(tensor, count) for tensor in (rows, *more)), strict=True)
