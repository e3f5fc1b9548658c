"""What ranks do with every family: import, logits, gradients, export, a few steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.families import all_families
from megabridge.layers.logits import gather_logits
from tests.cases.convert import provide
from tests.cases.models import prompt, write_model


def tiny_config(architecture: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a family's tiny model."""
    family = all_families()[architecture]
    return {"architectures": [architecture], "model_type": family.model_type, **family.tiny, "dtype": "float32", **changes}


def make(root: str, architectures: list[str], changes: dict[str, Any]) -> None:
    """Tiny models with random weights, and transformers' logits of them."""
    for architecture in architectures:
        folder = write_model(Path(root) / architecture, tiny_config(architecture, **changes), seed=3)
        reference(folder)


def reference(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        torch.save(model(prompt(131)).logits, folder / "logits.pt")


def round_trips(root: str, out: str, architectures: list[str]) -> dict[str, dict[str, Any]]:
    """Import, logits, export of each."""
    seen = {}
    for architecture in architectures:
        begin = time.monotonic()
        source = Path(root) / architecture
        bridge = AutoBridge.from_hf_pretrained(source)
        model = provide(bridge)
        expected = torch.load(source / "logits.pt")
        logits = gather_logits(model, prompt(131))
        export = bridge.save_hf_pretrained(model, Path(out) / architecture, show_progress=False)
        seen[architecture] = {
            "difference": ((logits - expected).abs().max() / expected.abs().max()).item(),
            "mismatched": export.mismatched,
            "seconds": time.monotonic() - begin,
        }
    return seen
