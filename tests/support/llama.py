"""Tiny random Llama models of transformers, and their weights in native chunks: the tests' own mapping.

It maps whole tensors and cuts them by the attributes of the live parameter, so it holds for gradients too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megabridge.models.provider import ModelProvider

from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def hf_model(shape: dict[str, Any]) -> Any:
    """A transformers model with the same large random weights on every rank: all parts matter for the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape}, attn_implementation="sdpa")).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


def provider_of(shape: dict[str, Any], settings: dict[str, Any]) -> ModelProvider:
    """The provider of `hf_model(shape)`."""
    full = {**SHAPE, **shape}
    provider = ModelProvider(
        {
            "num_layers": full["num_hidden_layers"],
            "hidden_size": full["hidden_size"],
            "ffn_hidden_size": full["intermediate_size"],
            "num_attention_heads": full["num_attention_heads"],
            "num_query_groups": full["num_key_value_heads"],
            "kv_channels": full["head_dim"],
            "layernorm_epsilon": full["rms_norm_eps"],
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_qkv_bias": full["attention_bias"],
            "add_attn_proj_bias": full["attention_bias"],
            "add_mlp_bias": full["mlp_bias"],
            "vocab_size": full["vocab_size"],
            "seq_length": full["max_position_embeddings"],
            "share_embeddings_and_output_weights": full["tie_word_embeddings"],
            "rope": full["rope_parameters"],
        },
        family_name="LlamaForCausalLM",
    )
    for name, value in settings.items():
        setattr(provider, name, value)
    return provider


def sizes(**short: Any) -> dict[str, Any]:
    """Provider settings from tp=, pp=, vpp=, sp=."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "sp": "sequence_parallel",
    }
    return {names[name]: value for name, value in short.items()}


def _fused_qkv(source: Callable[[str], Tensor], layer: int, kind: str, groups: int) -> Tensor:
    """Group by group: the group's query heads, its key head, its value head."""
    parts = [source(f"model.layers.{layer}.self_attn.{name}_proj.{kind}") for name in "qkv"]
    cut = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(cut, dim=1).flatten(0, 1)


def native_tensor(name: str, config: Any, offset: int, source: Callable[[str], Tensor]) -> Tensor:
    """The whole native tensor of parameter `name`, from transformers' tensors by name."""
    if name == "embedding.word_embeddings.weight":
        return source("model.embed_tokens.weight")
    if name == "output_layer.weight":
        return source("lm_head.weight")
    if name == "decoder.final_layernorm.weight":
        return source("model.norm.weight")
    _, _, number, *rest = name.split(".")
    layer = int(number) + offset
    part, kind = ".".join(rest[:-1]), rest[-1]
    if part == "self_attention.linear_qkv":
        return _fused_qkv(source, layer, kind, config.num_query_groups)
    if part == "mlp.linear_fc1":
        return torch.cat([source(f"model.layers.{layer}.mlp.{name}_proj.{kind}") for name in ("gate", "up")])
    direct = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "mlp.linear_fc2": "mlp.down_proj",
    }
    return source(f"model.layers.{layer}.{direct[part]}.{kind}")


def shard(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor; missing vocabulary rows are zero."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    dim, stride = parameter.partition_dim, parameter.partition_stride
    size = parameter.shape[dim] * tp
    if whole.shape[dim] < size:
        assert dim == 0
        whole = torch.cat([whole, whole.new_zeros(size - whole.shape[0], *whole.shape[1:])])
    return torch.cat(whole.chunk(tp * stride, dim)[rank::tp], dim)


def parameters(chunks: Sequence[Any]) -> list[tuple[str, int, Any]]:
    """Name, layer offset of its chunk, and parameter, of every parameter here."""
    found = []
    for chunk in unwrap_model(list(chunks)):
        layers = chunk.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        found += [(name, offset, parameter) for name, parameter in chunk.named_parameters()]
    return found


@torch.no_grad()
def load(chunks: Sequence[Any], config: Any, hf: Any) -> None:
    """Copies the weights of a transformers model into this rank's chunks."""
    state = dict(hf.named_parameters(remove_duplicate=False))
    for name, offset, parameter in parameters(chunks):
        part = shard(native_tensor(name, config, offset, state.__getitem__), parameter)
        assert part.shape == parameter.shape, (name, part.shape, parameter.shape)
        parameter.copy_(part)


def provided(shape: dict[str, Any], settings: dict[str, Any], hf: Any, *, wrap_with_ddp: bool) -> tuple[ModelProvider, list[Any]]:
    """The provider of a shape, and its chunks with the weights of `hf`."""
    provider = provider_of(shape, settings)

    def fill(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        load(chunks, provider.config, hf)
        return chunks

    provider.register_pre_wrap_hook(fill)
    return provider, provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp, init="empty")
