"""Compiled functions on one CUDA device, beside the same ones uncompiled."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available() and os.environ["MEGABRIDGE_PLATFORM"] == "cuda"
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device and make test-gpu")


class Alone:
    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def both(function: Callable[..., Tensor], tensors: Sequence[Tensor], *others: object) -> list[list[Tensor]]:
    """[result, gradients of `tensors`] compiled, and uncompiled."""
    found = []
    for stance in ("default", "force_eager"):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with torch.compiler.set_stance(stance):
            out = function(*leaves, *others)
            torch.manual_seed(5)
            out.backward(torch.randn_like(out))
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    return found


@pytest.mark.parametrize("shape", [(300, 2, 2048), (100, 2, 8, 64), (301, 1, 2048)])
def test_norms_round_as_uncompiled(shape: tuple[int, ...]) -> None:
    """Sums are taken in another order, so that one value in a hundred may round the other way: to its neighbour."""
    from megabridge.models.layers import fused

    torch.manual_seed(1)
    x = (torch.randn(shape, device="cuda") * 3).bfloat16()
    weight = torch.rand(shape[-1], device="cuda").bfloat16()
    for zero_centred in (False, True):
        norm = functools.partial(fused.rms_norm, zero_centred=zero_centred)
        (out, *gradients), (expected, *wanted) = both(norm, [x, weight], 1e-5)
        assert (out != expected).float().mean() < 0.01
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
        for mine, other in zip(gradients, wanted, strict=True):
            assert (mine - other).abs().max() <= 2**-7 * other.abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [64, 32])
def test_rotary_embeddings_are_the_uncompiled_bits(interleaved: bool, part: int) -> None:
    from megabridge.models.layers import fused

    torch.manual_seed(1)
    x = torch.randn(130, 2, 8, 64, device="cuda").bfloat16()
    angles = torch.rand(130, 1, 1, part, device="cuda") * 100
    cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
    (out, gradient), (expected, wanted) = both(lambda tensor: fused.rotate(tensor, cosine, sine, interleaved=interleaved), [x])
    assert torch.equal(out, expected)
    assert torch.equal(gradient, wanted)


def test_the_loss_is_torchs_and_needs_no_memory_of_the_logits_size() -> None:
    from megabridge.models.layers.loss import cross_entropy

    torch.manual_seed(1)
    leaf = (torch.randn(2048, 2, 32_001, device="cuda") * 3).bfloat16().requires_grad_()
    labels = torch.randint(32_001, (2048, 2), device="cuda")
    logits = leaf * 1
    cross_entropy(logits * 1, labels, Alone()).sum().backward()  # compiles
    leaf.grad = None
    logits = leaf * 1
    before, size = torch.cuda.memory_allocated(), logits.numel() * logits.element_size()
    torch.cuda.reset_peak_memory_stats()
    losses = cross_entropy(logits, labels, Alone())
    losses.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size  # the leaf's own gradient
    expected = F.cross_entropy(leaf.detach().float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    softmax = leaf.detach().float().softmax(-1)
    softmax.scatter_add_(-1, labels[..., None], -torch.ones_like(losses)[..., None])
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.float(), softmax, rtol=2**-7, atol=1e-6)
