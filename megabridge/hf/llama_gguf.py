"""Converts a llama GGUF file to a Hugging Face folder: dequantised weights, tokenizer and chat template.

Supports only what the quickstart's file needs: the Llama architecture and a GPT-2 style byte-level BPE. llama.cpp stores the rows
of q and k in the order of its rotary embedding (llama.cpp/convert_hf_to_gguf.py, `permute`); here they are permuted back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from megabridge.errors import CheckpointError
from megabridge.hf.safetensors_format import build_header

# fmt: off
NAMES: Final = (
    # GGUF                           Hugging Face
    ("token_embd.weight",            "model.embed_tokens.weight"),
    ("blk.{layer}.attn_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    ("blk.{layer}.attn_q.weight",    "model.layers.{layer}.self_attn.q_proj.weight"),
    ("blk.{layer}.attn_k.weight",    "model.layers.{layer}.self_attn.k_proj.weight"),
    ("blk.{layer}.attn_v.weight",    "model.layers.{layer}.self_attn.v_proj.weight"),
    ("blk.{layer}.attn_output.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
    ("blk.{layer}.ffn_norm.weight",  "model.layers.{layer}.post_attention_layernorm.weight"),
    ("blk.{layer}.ffn_gate.weight",  "model.layers.{layer}.mlp.gate_proj.weight"),
    ("blk.{layer}.ffn_up.weight",    "model.layers.{layer}.mlp.up_proj.weight"),
    ("blk.{layer}.ffn_down.weight",  "model.layers.{layer}.mlp.down_proj.weight"),
    ("output_norm.weight",           "model.norm.weight"),
)
CONFIG_FIELDS: Final = (
    # Hugging Face               GGUF
    ("hidden_size",             "llama.embedding_length"),
    ("intermediate_size",       "llama.feed_forward_length"),
    ("max_position_embeddings", "llama.context_length"),
    ("num_attention_heads",     "llama.attention.head_count"),
    ("num_hidden_layers",       "llama.block_count"),
    ("num_key_value_heads",     "llama.attention.head_count_kv"),
    ("rms_norm_eps",            "llama.attention.layer_norm_rms_epsilon"),
    ("rope_theta",              "llama.rope.freq_base"),
    ("vocab_size",              "llama.vocab_size"),
    ("bos_token_id",            "tokenizer.ggml.bos_token_id"),
    ("eos_token_id",            "tokenizer.ggml.eos_token_id"),
    ("pad_token_id",            "tokenizer.ggml.padding_token_id"),
)
# fmt: on
CONTROL: Final = 3
"""Type of a special token in tokenizer.ggml.token_type (llama.cpp, LLAMA_TOKEN_TYPE_CONTROL)."""


def convert(file: Path, folder: Path, *, config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes config.json, generation_config.json, the tokenizer with its chat template, and model.safetensors into `folder`.

    `config` is a config.json for this model; values in the GGUF must agree with it. The weights are rounded from the dequantised
    float32 to `dtype`. Raises CheckpointError for a disagreement, and for missing or additional tensors.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise CheckpointError(f"{file} can't be read as a GGUF file ({error}); fetch it again.") from error
    facts = {name: field.contents() for name, field in reader.fields.items()}
    _check_config(file, config, facts)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _write_weights(file, folder / "model.safetensors", tensors, config, dtype)
    _write_tokenizer(folder, facts)
    _write_json(folder / "config.json", config)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def _check_config(file: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    if facts.get("general.architecture") != "llama" or facts.get("tokenizer.ggml.model") != "gpt2":
        raise CheckpointError(
            f"{file} must hold a llama model with a gpt2 tokenizer, not {facts.get('general.architecture')} with "
            f"{facts.get('tokenizer.ggml.model')}; convert it with transformers."
        )
    for name, source in CONFIG_FIELDS:
        # rms_norm_eps is a float32 in the file.
        if abs(facts[source] - config[name]) > 1e-6 * abs(config[name]):
            raise CheckpointError(f"{file} must have {source}={config[name]}, not {facts[source]}; fetch the right file.")


def _write_weights(file: Path, target: Path, tensors: dict[str, Any], config: Mapping[str, Any], dtype: torch.dtype) -> None:
    layers = range(config["num_hidden_layers"])
    names = {
        native.format(layer=layer): hf.format(layer=layer)
        for native, hf in NAMES
        for layer in (layers if "{layer}" in native else (0,))
    }
    if tensors.keys() != names.keys():
        raise CheckpointError(
            f"{file} must hold exactly the tensors of a tied llama; missing {sorted(names.keys() - tensors.keys())}, "
            f"left over {sorted(tensors.keys() - names.keys())}; fetch it again."
        )
    # GGUF lists dimensions from the fastest to the slowest, Hugging Face the other way round.
    entries = [(names[name], dtype, tuple(int(size) for size in reversed(tensors[name].shape))) for name in names]
    header, _ = build_header(entries)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    with target.open("wb") as stream:
        stream.write(header)
        for name, (_, _, shape) in zip(names, entries, strict=True):
            weight = dequantized(tensors[name]).view(shape)
            part = name.split(".")[-2]
            if part in heads:
                weight = _rows_in_hf_order(weight, heads[part])
            data = weight.to(dtype).contiguous()
            stream.write(data.view(torch.uint8).numpy().data)


def dequantized(tensor: Any) -> torch.Tensor:
    """Returns the float32 values of a gguf.ReaderTensor."""
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def _rows_in_hf_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's `permute` of [heads * head_dim, hidden], which interleaves the two halves of a head's rows."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_tokenizer(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, with llama.cpp's pre-tokenizer `smollm`: digits, then GPT-2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    if facts["tokenizer.ggml.pre"] != "smollm":
        raise CheckpointError(f"the pre-tokenizer must be 'smollm', not {facts['tokenizer.ggml.pre']!r}; fetch the right file.")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    role = {
        f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    settings = {
        "add_prefix_space": False,
        **role,
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
