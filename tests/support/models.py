"""Small Hugging Face models for tests: random Llama configs, and folders with random weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabridge.families import mixtral
from megabridge.families.llama import FAMILY

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.3,
     "beta_fast": 16.0, "beta_slow": 2.0},
]  # fmt: skip


def llama_config(seed: int) -> dict[str, Any]:
    """A random Llama shape that is legal at TP 1, 2, 4 x PP 1, 2."""
    draw = random.Random(seed)
    heads = draw.choice([4, 8, 12])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": heads * draw.choice([4, 6, 8]),  # transformers wants a multiple of the heads
        "intermediate_size": draw.choice([32, 44, 64, 96]),
        "num_hidden_layers": draw.choice([2, 3, 4, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([kv for kv in (1, 2, 4, 8, 12) if heads % kv == 0]),
        "head_dim": draw.choice([4, 8, 10, 16]),
        "vocab_size": draw.choice([61, 64, 97, 130, 131, 257]),
        "max_position_embeddings": 128,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "attention_bias": draw.random() < 0.4,
        "mlp_bias": draw.random() < 0.4,
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": draw.choice(ROPES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "dtype": "float32",
    }


TINY: dict[str, Any] = {
    **{
        key: value for key, value in llama_config(0).items() if key in ("architectures", "model_type", "hidden_act", "bos_token_id")
    },
    **FAMILY.tiny,
    "dtype": "float32",
}

TINY_MIXTURE: dict[str, Any] = {
    **TINY, **mixtral.FAMILY.tiny, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"
}  # fmt: skip
for _key in TINY.keys() - mixtral.FAMILY.tiny.keys() - {"architectures", "model_type", "hidden_act", "bos_token_id", "dtype"}:
    del TINY_MIXTURE[_key]


def mixtral_config(seed: int) -> dict[str, Any]:
    """A random Mixtral shape that is legal wherever tp, etp and ep are of 1, 2 and 4, and pp x vpp at most 4."""
    draw = random.Random(seed)
    experts = draw.choice([4, 8, 12, 16])
    return {
        **TINY_MIXTURE,
        "hidden_size": 8 * draw.choice([4, 6, 8]),
        "intermediate_size": draw.choice([16, 20, 24, 44]),
        "num_hidden_layers": draw.choice([4, 5]),
        "num_key_value_heads": draw.choice([1, 2, 4, 8]),
        "vocab_size": draw.choice([61, 64, 97, 131]),
        "num_local_experts": experts,
        "num_experts_per_tok": draw.choice([2, 3, 4]),
    }


def write_model(folder: Path, config: dict[str, Any], seed: int = 0, std: float = 0.2) -> Path:
    """Random weights of a config's shape, every tensor nonzero (biases and norms too), as transformers writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, config["dtype"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std)
            if ("norm" in name or "ln_" in name) and name.endswith("weight") and config["model_type"][:5] != "gemma":
                parameter.add_(1.0)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)  # as published: transformers' own keys are not part of it
    return folder


def reference_logits(folder: Path, tokens: Any) -> Any:
    """Logits [batch, sequence, vocabulary] of transformers, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens).logits


def prompt(vocab_size: int, *, batch: int = 2, length: int = 40, seed: int = 5) -> Any:
    import torch

    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def changed_model(source: Path, target: Path, change: Callable[[dict[str, Any]], object] | None = None, **config: Any) -> Path:
    """A copy of a model with its tensors or its config changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **config}))
    return target
