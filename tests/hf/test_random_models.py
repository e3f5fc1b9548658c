"""Models with random weights, made on the spot, as transformers loads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megabridge.errors import CheckpointError, ConfigError
from megabridge.hf.random_models import write_random_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_model_loads_and_speaks(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_random_model(tmp_path / "model", CONFIG, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == dtype and model.config.num_key_value_heads == 2
    tokens = tokenizer("hello", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] > 5
    written = json.loads((folder / "config.json").read_text())
    assert written == CONFIG | {"dtype": str(dtype).removeprefix("torch.")}


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    folders = [write_random_model(tmp_path / name, CONFIG, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.equal(state, torch.get_rng_state())
    first, second, third = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second != third
    assert "lm_head.weight" not in load_file(folders[0] / "model.safetensors")


def test_files_obey_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = write_random_model(tmp_path / "model", CONFIG)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_refusals(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", CONFIG)
    with pytest.raises(CheckpointError, match="must be empty or not exist"):
        write_random_model(folder, CONFIG)
    with pytest.raises(ConfigError, match="vocab_size=100 must be at least 260"):
        write_random_model(tmp_path / "small", CONFIG | {"vocab_size": 100})
    with pytest.raises(ConfigError, match="model_type='llamma' must be a causal model of transformers"):
        write_random_model(tmp_path / "unknown", CONFIG | {"model_type": "llamma"})
