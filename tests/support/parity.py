"""What the ranks of tests/models/layers/test_parity.py run: logits and losses beside transformers'."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megabridge.models.logits import gather_logits
from megabridge.parallel import process_groups
from tests.support import llama


def compare(cases: list[tuple[dict[str, Any], dict[str, Any]]], length: int = 32) -> list[dict[str, Any]]:
    """Per (shape, provider settings): the largest differences in logits and loss, and what the provider says."""
    return [_compare(shape, settings, length) for shape, settings in cases]


def _compare(shape: dict[str, Any], settings: dict[str, Any], length: int) -> dict[str, Any]:
    hf = llama.hf_model(shape)
    provider, chunks = llama.provided(shape, settings, hf, wrap_with_ddp=False)
    tokens = torch.randint(0, provider.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf(tokens).logits
    logits = gather_logits(chunks, tokens)
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    return {
        "split": provider.split,
        "vpp": (process_groups.current() or process_groups.Topology()).vpp,
        "scale": float(expected.std()),
        "logits": float((logits - expected).abs().max()),
        "loss": _loss_difference(chunks, tokens, expected),
    }


@torch.no_grad()
def _loss_difference(chunks: list[Any], tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """The model's own loss (padded columns masked, vocabulary cut over tp); 0 where the loss is not on this rank."""
    if len(chunks) > 1 or not (chunks[0].pre_process and chunks[0].post_process):
        return 0.0
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    labels = tokens.roll(-1, 1)
    losses = chunks[0](tokens, positions, None, labels=labels)
    wanted = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none").view_as(losses)
    return float((losses - wanted).abs().max())
