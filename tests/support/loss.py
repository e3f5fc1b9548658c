"""Runs in ranks: the loss of logits whose vocabulary is cut over tp, beside torch's cross-entropy of the whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megabridge.models.layers.loss import cross_entropy

from megatron.core import parallel_state


def difference(dtype: str, vocab: int) -> tuple[float, float]:
    """(of losses, of gradients): the largest beside torch's in float64, over random logits and labels.

    The last shard is as good as padding throughout, and some rows have one logit that outweighs the others.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 3, vocab * group.size(), generator=random) * 4
    logits[..., vocab * (group.size() - 1) + 1 :] = torch.finfo(getattr(torch, dtype)).min
    logits[0, 0, 1] = 200.0
    logits = logits.to(getattr(torch, dtype))
    labels = torch.randint(vocab * (group.size() - 1) + 1, (7, 3), generator=random)
    labels[0, 0] = 1
    weights = torch.rand(7, 3, generator=random)
    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view(7, 3)
    (expected * weights).sum().backward()
    mine = slice(group.rank() * vocab, (group.rank() + 1) * vocab)
    leaf = logits[..., mine].clone().requires_grad_()
    losses = cross_entropy(leaf * 1, labels, group)
    (losses * weights).sum().backward()
    assert whole.grad is not None and leaf.grad is not None and losses.dtype is torch.float32 and leaf.grad.dtype is logits.dtype
    return (losses - expected).abs().max().item(), (leaf.grad - whole.grad[..., mine]).abs().max().item()
