"""Norms are transformers' and torch's, also in bf16, and carry the mark of sequence parallelism."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megabridge.models.layers.norm import LayerNorm, RMSNorm

from megatron.core.transformer.transformer_config import TransformerConfig


def config(dtype: torch.dtype, *, sequence_parallel: bool = False) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=48,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        cuda_graph_modules=[],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_llamas_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(config(dtype), 48, eps=1e-6), LlamaRMSNorm(48, eps=1e-6).to(dtype)
    with torch.no_grad():
        ours.weight.normal_(1.0, 0.3)
        theirs.weight.copy_(ours.weight)
    x = (torch.randn(5, 3, 48) * 4).to(dtype)
    assert ours(x).dtype == dtype
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_gradients(dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(config(dtype), 48, eps=1e-6), LlamaRMSNorm(48, eps=1e-6).to(dtype)
    x = torch.randn(5, 3, 48).to(dtype)
    direction = torch.randn(5, 3, 48).to(dtype)
    gradients = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (norm(leaf) * direction).sum().backward()
        gradients.append((leaf.grad, norm.weight.grad))
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def test_layer_norm_is_torchs() -> None:
    ours, theirs = LayerNorm(config(torch.float32), 48, eps=1e-3), torch.nn.LayerNorm(48, eps=1e-3)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 48)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_parameters_say_whether_their_gradients_are_partial(sequence_parallel: bool) -> None:
    for norm in (RMSNorm, LayerNorm):
        built = norm(config=config(torch.bfloat16, sequence_parallel=sequence_parallel), hidden_size=48, eps=1e-5)
        for parameter in built.parameters():
            assert parameter.dtype == torch.bfloat16
            assert parameter.sequence_parallel == sequence_parallel
