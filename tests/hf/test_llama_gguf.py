"""GGUF to Hugging Face: the rows of q and k, the dequantised values, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megabridge.errors import CheckpointError
from megabridge.hf import llama_gguf
from megabridge.hf.byte_tokenizer import _printable
from megabridge.hf.random_models import write_random_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, weights: dict[str, torch.Tensor], **changed: int) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    for name, key in llama_gguf.CONFIG_FIELDS:
        value = changed.get(name, CONFIG[name])
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|im_start|>", "<|im_end|>", *map(_printable, range(256)), "ab"])
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for pattern, hf in llama_gguf.NAMES:
        for layer in range(2) if "{layer}" in pattern else (0,):
            weight = weights.get(hf.format(layer=layer))
            if weight is None:
                continue
            data = weight.numpy()
            if "attn_q" in pattern or "attn_k" in pattern:
                data = permute(data, CONFIG["num_attention_heads" if "attn_q" in pattern else "num_key_value_heads"])
            writer.add_tensor(pattern.format(layer=layer), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    return load_file(write_random_model(tmp_path / "source", CONFIG, tokenizer=False) / "model.safetensors")


def test_every_weight_comes_back(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    write_gguf(tmp_path / "model.gguf", weights)
    made = tmp_path / "made"
    made.mkdir()
    llama_gguf.convert(tmp_path / "model.gguf", made, config=CONFIG, dtype=torch.float32)
    found = load_file(made / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    tokens = torch.arange(20)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (made, tmp_path / "source")]
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert (
        tokenizer("bab<|im_end|>")["input_ids"] == [2 + ord("b"), 258, 1]
        and tokenizer.chat_template == "{{ messages[0]['content'] }}"
    )


def test_dequantised_values_of_q4_1() -> None:
    """Blocks of 32: float16 scale and minimum, then 16 bytes whose low halves are the first 16 values (ggml-quants.c)."""
    scale, minimum = np.float16(0.25), np.float16(-1.5)
    packed = np.arange(16, dtype=np.uint8) | (np.arange(16, dtype=np.uint8)[::-1] << 4)
    block = np.frombuffer(scale.tobytes() + minimum.tobytes() + packed.tobytes(), np.uint8)[None]

    class Tensor:
        data, tensor_type = block, gguf.GGMLQuantizationType.Q4_1

    expected = [0.25 * value - 1.5 for value in [*range(16), *reversed(range(16))]]
    assert llama_gguf.dequantized(Tensor).flatten().tolist() == expected


def test_what_does_not_fit_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    (tmp_path / "made").mkdir()
    write_gguf(tmp_path / "other.gguf", weights, num_attention_heads=8)
    with pytest.raises(CheckpointError, match=r"must have llama.attention.head_count=4, not 8"):
        llama_gguf.convert(tmp_path / "other.gguf", tmp_path / "made", config=CONFIG)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    write_gguf(tmp_path / "part.gguf", weights)
    with pytest.raises(CheckpointError, match=r"missing \['blk.1.ffn_up.weight'\]"):
        llama_gguf.convert(tmp_path / "part.gguf", tmp_path / "made", config=CONFIG)
