"""Routers of single architectures, beside transformers' functions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from megabridge.models.layer_options import LayerOptions
from megabridge.models.layers.router import SparseMixer


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3])
def test_the_sparse_mixer_weighs_and_chooses_as_transformers_does(jitter: float) -> None:
    router = SparseMixer.__new__(SparseMixer)  # only `select` is asked for, which needs no parameters
    torch.nn.Module.__init__(router)
    router.topk, router.options = 2, LayerOptions(router_jitter=jitter)
    ours = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights, experts = router.select(ours)
    expected, chosen = sparsemixer(theirs, jitter_eps=jitter, training=False)
    assert torch.equal(experts, chosen) and torch.equal(weights, expected)
    if jitter:
        assert 0 < (weights == 1).float().mean() < 1  # some experts stand alone, some share
    factors = torch.arange(1000.0).view(500, 2)
    (weights * factors).sum().backward()
    (expected * factors).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
