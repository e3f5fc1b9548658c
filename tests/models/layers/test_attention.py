"""Core attention beside the formula, in fp32."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megabridge.errors import ConfigError
from megabridge.models.layer_options import LayerOptions
from megabridge.models.layers import flex
from megabridge.models.layers.attention import TorchAttention
from megabridge.models.layers.packed import packed

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

S, B, HEADS, D = 6, 2, 4, 8


def attention(kind: Any = AttnMaskType.causal, **settings: Any) -> TorchAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * D, num_attention_heads=HEADS, attention_dropout=0.5, cuda_graph_modules=[]
    )
    return TorchAttention(config, layer_number=1, attn_mask_type=kind, attention_type="self", **settings).eval()


def tensors(kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(S, B, HEADS, D), torch.randn(S, B, kv_heads, D), torch.randn(S, B, kv_heads, D)


def formula(query: Tensor, key: Tensor, value: Tensor, masked: Tensor, scale: float) -> Tensor:
    """softmax(q k * scale) v, written out; `masked` [b or 1, 1, s, s]."""
    repeats = HEADS // key.shape[2]
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    weights = torch.nan_to_num(scores.masked_fill(masked, -math.inf).softmax(-1))
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


FUTURE = torch.ones(S, S, dtype=torch.bool).triu(1)[None, None]
PADDED = torch.tensor([[False] * S, [False] * 4 + [True] * 2])[:, None, None, :]
CHUNKS = FUTURE | (torch.arange(S)[:, None] // 4 != torch.arange(S) // 4)
WINDOW = FUTURE | torch.ones(S, S, dtype=torch.bool).tril(-3)
NOTHING = torch.zeros(1, 1, S, S, dtype=torch.bool)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("kind", "mask", "effective"),
    [
        (AttnMaskType.causal, None, FUTURE),
        (AttnMaskType.causal, PADDED, FUTURE | PADDED),
        (AttnMaskType.causal, WINDOW, WINDOW),
        (AttnMaskType.padding_causal, PADDED, FUTURE | PADDED),
        (AttnMaskType.padding, PADDED, PADDED | NOTHING),
        (AttnMaskType.no_mask, None, NOTHING),
    ],
)
def test_masks(kv_heads: int, kind: Any, mask: Tensor | None, effective: Tensor) -> None:
    query, key, value = tensors(kv_heads)
    context = attention(kind)(query, key, value, mask)
    assert context.shape == (S, B, HEADS * D)
    torch.testing.assert_close(context, formula(query, key, value, effective, D**-0.5), atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan() -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(2)]
    left = torch.tensor([[True] * 2 + [False] * 4, [False] * S])[:, None, None, :]
    context = attention()(*leaves, left)
    assert context[:2, 0].abs().max() == 0
    context.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_scale_of_the_caller() -> None:
    query, key, value = tensors(2)
    context = attention(softmax_scale=0.7)(query, key, value, None)
    torch.testing.assert_close(context, formula(query, key, value, FUTURE, 0.7), atol=1e-5, rtol=1e-5)


def test_value_heads_of_another_width() -> None:
    query, key, _ = tensors(4)
    value = torch.randn(S, B, 4, 3)
    context = attention(k_channels=D, v_channels=3)(query, key, value, None)
    torch.testing.assert_close(context, formula(query, key, value, FUTURE, D**-0.5), atol=1e-5, rtol=1e-5)


def test_what_it_does_not_know_is_refused() -> None:
    query, key, value = tensors(2)
    with pytest.raises(ConfigError, match="no attention bias"):
        attention()(query, key, value, None, attention_bias=torch.zeros(1))


def styled(options: LayerOptions, **settings: Any) -> TorchAttention:
    config = TransformerConfig(num_layers=2, hidden_size=HEADS * D, num_attention_heads=HEADS, cuda_graph_modules=[], **settings)
    kind = AttnMaskType.causal
    return TorchAttention(config, layer_number=1, attn_mask_type=kind, attention_type="self", options=options).eval()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", [None, PADDED])
def test_windows_are_counted_with_the_query_itself(kv_heads: int, mask: Tensor | None) -> None:
    query, key, value = tensors(kv_heads)
    ours = styled(LayerOptions(), window_size=(2, 0))
    expected = formula(query, key, value, WINDOW if mask is None else WINDOW | mask, D**-0.5)
    torch.testing.assert_close(ours(query, key, value, mask), expected)
    elsewhere = styled(LayerOptions(), window_size=(2, 0), window_attn_skip_freq=[0, 1])
    torch.testing.assert_close(elsewhere(query, key, value, None), formula(query, key, value, FUTURE, D**-0.5))


@pytest.mark.parametrize("mask", [None, PADDED])
def test_chunks_end_at_the_query(mask: Tensor | None) -> None:
    query, key, value = tensors(2)
    ours = styled(LayerOptions(attention_chunks=True), window_size=(3, 0))
    expected = formula(query, key, value, CHUNKS if mask is None else CHUNKS | mask, D**-0.5)
    torch.testing.assert_close(ours(query, key, value, mask), expected)


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_capped_scores(window: Any) -> None:
    query, key, value = tensors(2)
    ours = styled(LayerOptions(attention_softcap=0.5), window_size=window)
    repeated = key.repeat_interleave(2, 2), value.repeat_interleave(2, 2)
    scores = 0.5 * torch.tanh(torch.einsum("sbhd,tbhd->bhst", query, repeated[0]) * D**-0.5 / 0.5)
    weights = scores.masked_fill(FUTURE if window is None else WINDOW, -math.inf).softmax(-1)
    torch.testing.assert_close(ours(query, key, value, None), torch.einsum("bhst,tbhd->sbhd", weights, repeated[1]).flatten(2))


def test_queries_grow_with_their_position() -> None:
    query, key, value = tensors(4)
    factor = 1 + 0.5 * torch.log(1 + torch.floor(torch.arange(S) / 2))
    expected = formula(query * factor[:, None, None, None], key, value, FUTURE, D**-0.5)
    torch.testing.assert_close(styled(LayerOptions(query_temperature=(0.5, 2, 0)))(query, key, value, None), expected)
    here, elsewhere = (styled(LayerOptions(query_temperature=(0.5, 2, 0)), no_rope_freq=layers) for layers in ([1, 0], [0, 1]))
    torch.testing.assert_close(here(query, key, value, None), expected)
    torch.testing.assert_close(elsewhere(query, key, value, None), formula(query, key, value, FUTURE, D**-0.5))


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_sinks_take_their_share_and_give_nothing(window: Any) -> None:
    query, key, value = tensors(2)
    ours = styled(
        LayerOptions(), window_size=window, softmax_type="learnable", use_cpu_initialization=True, perform_initialization=False
    )
    assert ours.softmax_offset is not None
    sinks = torch.randn(HEADS)
    ours.softmax_offset.data.copy_(sinks)
    repeated = key.repeat_interleave(2, 2), value.repeat_interleave(2, 2)
    scores = torch.einsum("sbhd,tbhd->bhst", query, repeated[0]) * D**-0.5
    masked = scores.masked_fill(FUTURE if window is None else WINDOW, -math.inf)
    weights = masked.exp() / (masked.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(ours(query, key, value, None), torch.einsum("bhst,tbhd->sbhd", weights, repeated[1]).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("style", "settings"),
    [
        ({}, {}),
        ({}, {"window_size": (2, 0)}),
        ({"attention_softcap": 0.5}, {"window_size": (3, 0)}),
        ({}, {"sinks": True}),
        ({"query_temperature": (0.5, 2, 1), "qk_norm": "rotated"}, {}),
        ({"attention_chunks": True}, {"window_size": (3, 0)}),
    ],
)
def test_packed_documents_in_one_kernel_and_one_by_one(
    style: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's program is that of CUDA; here torch runs it without compiling it."""
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
    params = packed(documents, positions)
    assert params.bounds == (0, 5, 7, 8, 9, 16) and params.max_seqlen_q == 7
    torch.manual_seed(1)
    query, key, value = torch.randn(16, HEADS, D), torch.randn(16, 2, D), torch.randn(16, 2, D)
    has_sinks = settings.get("sinks", False)
    ours = styled(LayerOptions(**style), **{name: value for name, value in settings.items() if name != "sinks"})
    ours.softmax_offset = torch.nn.Parameter(torch.randn(HEADS)) if has_sinks else None
    ours.requires_grad_(False)
    one_by_one = ours(query, key, value, None, packed_seq_params=params)
    bounds = itertools.pairwise(params.bounds)
    alone = [ours(*(tensor[begin:end, None] for tensor in (query, key, value)), None) for begin, end in bounds]
    assert torch.equal(one_by_one, torch.cat(alone)) and not params.masks
    monkeypatch.setattr(flex, "can_take", lambda query, dropout: True)
    monkeypatch.setattr(flex, "_kernel", lambda: flex.flex_attention)
    together = ours(query, key, value, None, packed_seq_params=params)
    assert len(params.masks) == 1 and together.shape == (16, 1, HEADS * D)
    torch.testing.assert_close(together, one_by_one)
