"""What ranks do with the real model."""

from __future__ import annotations

from pathlib import Path

import torch

from megabridge import AutoBridge
from megabridge.models.logits import gather_logits
from tests.support.convert import provide
from tests.support.models import prompt, reference_logits


def reference(source: str, out: str) -> None:
    """transformers' logits of the fixed prompt, in fp32."""
    torch.save(reference_logits(Path(source), prompt(49152, length=64)), out)


def round_trip(source: str, out: str, expected: str | None) -> float | None:
    """Imports and exports the model in its own dtype; with `expected` logits, how far those in fp32 are from them."""
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_hf_pretrained(provide(bridge), out, show_progress=False)
    if expected is None:
        return None
    model = provide(AutoBridge.from_hf_pretrained(source, dtype="float32"))
    return (gather_logits(model, prompt(49152, length=64)) - torch.load(expected)).abs().max().item()
