"""Random weights of tiny models, as exports have them."""

from __future__ import annotations

import math
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.parallel import process_groups
from tests.support.convert import provide
from tests.support.families import tiny_config
from tests.support.stream import digest

SMALL: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 2001, "tie_word_embeddings": False, "initializer_range": 0.05,
}  # fmt: skip
"""Some tensors have several tiles."""


def digests(architectures: list[str], dtype: str = "float32") -> dict[str, dict[str, str]]:
    """By architecture and Hugging Face name, of models that begin at random in the layout that runs."""
    return {name: {key: digest(tensor) for key, tensor in _weights(tiny_config(name), dtype)} for name in architectures}


def _weights(config: dict[str, Any], dtype: str) -> list[tuple[str, torch.Tensor]]:
    bridge = AutoBridge.from_hf_config(config)
    model = provide(bridge, load_weights=False, params_dtype=dtype)
    return list(bridge.export_hf_weights(model, cpu=True, show_progress=False))


def spreads() -> dict[str, Any]:
    """Of a model with several tiles a tensor: what differs from what it should be."""
    config = tiny_config("LlamaForCausalLM") | SMALL
    whole, half = dict(_weights(config, "float32")), dict(_weights(config, "bfloat16"))
    process_groups.seed(5)
    other = dict(_weights(config, "float32"))
    process_groups.seed(process_groups.DEFAULT_SEED)
    found: dict[str, Any] = {}
    for name, tensor in whole.items():
        if tensor.dim() < 2:
            continue
        expected = 0.05 / math.sqrt(4) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
        found[name] = {
            "deviation": float(tensor.std()) / expected,
            "mean": float(tensor.mean()) / expected,
            "largest": float(tensor.abs().max()) / expected,
            "repeated": tensor.numel() - len(tensor.flatten().unique()),
            "rounded": torch.equal(tensor.bfloat16(), half[name]),
            "same": float((tensor == other[name]).float().mean()),
        }
    return found
