"""Writes Hugging Face folders with random weights from the content of a config.json: models for tests and experiments."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megabridge.errors import CheckpointError, ConfigError
from megabridge.hf import byte_tokenizer


def write_random_model(
    folder: Path, config: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32, tokenizer: bool = True
) -> Path:
    """Writes config.json, model.safetensors (sharded above transformers' limit) and, with `tokenizer`, the byte-level tokenizer.

    config.json is `config`, with `dtype` set. The weights are transformers' own initialisation of that architecture and depend on
    `seed`, `config` and `dtype` alone. Returns `folder`. Raises CheckpointError if it is not empty, ConfigError for an architecture
    that transformers doesn't know or a vocabulary smaller than the tokenizer's.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} must be empty or not exist; choose another folder.")
    if tokenizer and config["vocab_size"] < byte_tokenizer.VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={config['vocab_size']} must be at least {byte_tokenizer.VOCAB_SIZE} for the byte-level tokenizer; "
            "raise it, or write the model without a tokenizer."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _random_model(config, seed=seed, dtype=dtype).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        _obey_umask(file)
    content = {name: value for name, value in config.items() if name != "torch_dtype"} | {
        "dtype": str(dtype).removeprefix("torch.")
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if tokenizer:
        byte_tokenizer.write_tokenizer(folder)
    return folder


def _random_model(config: Mapping[str, Any], *, seed: int, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        made = AutoConfig.for_model(**config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(made, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"model_type={config.get('model_type')!r} must be a causal model of transformers: {error}") from None


def _obey_umask(file: Path) -> None:
    """Gives a file, which safetensors creates with mode 0600, the mode of other new files."""
    copy = file.with_name(f".{file.name}")
    shutil.copyfile(file, copy)
    copy.replace(file)
