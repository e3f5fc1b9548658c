"""Frequencies and attention factors equal transformers' bit for bit; what can't be represented is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megabridge.errors import ConfigError
from megabridge.models.layers.rotary import inverse_frequencies, rope_problems

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 100000},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        LLAMA3,
        {**LLAMA3, "factor": 8.0, "high_freq_factor": 2.5, "original_max_position_embeddings": 64},
        YARN,
        {**YARN, "attention_factor": 0.7},
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "mscale": 0.9, "mscale_all_dim": 0.4},
        {**YARN, "mscale": 0.9},
        {**YARN, "factor": 1.0},
    ],
)
def test_equal_to_transformers(rope: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters=dict(rope),
    )
    theirs = LlamaRotaryEmbedding(config)
    frequencies, factor = inverse_frequencies(rope, head_dim)
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}


@pytest.mark.parametrize("length", [16, 32, 33, 64, 65, 200])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
        LONG,
        {**LONG, "attention_factor": 1.25},
        {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "factor": 8.0},
    ],
)
def test_equal_to_transformers_at_every_length(rope: dict[str, Any], length: int) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, max_position_embeddings=64, rope_parameters=dict(rope))
    theirs = LlamaRotaryEmbedding(config)
    theirs(torch.zeros(1), torch.arange(length)[None])
    own = {**rope, "max_position_embeddings": 64} if rope["rope_type"] == "dynamic" else rope
    frequencies, factor = inverse_frequencies(own, 16, length)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling


def test_a_stretched_base_as_hunyuan_has_it() -> None:
    from transformers import HunYuanDenseV1Config
    from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
    config = HunYuanDenseV1Config(hidden_size=32, num_attention_heads=2, head_dim=16, rope_parameters=rope)
    frequencies, _ = inverse_frequencies({"rope_type": "alpha", "rope_theta": 10000.0, "alpha": 50.0}, 16)
    assert torch.equal(frequencies, HunYuanDenseV1RotaryEmbedding(config).inv_freq)


def test_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        frequencies, _ = inverse_frequencies(YARN, 16)
    assert frequencies.device.type == "cpu"


@pytest.mark.parametrize(
    ("rope", "problem"),
    [
        ({"rope_type": "ntk", "rope_theta": 1e4}, "rope_type='ntk' is not supported; use one of default, l"),
        ({"rope_type": "longrope", "rope_theta": 1e4}, "rope_type='longrope' needs factor, which is missing"),
        ({**LONG, "beta_fast": 32}, "rope_parameters.beta_fast=32 has no meaning for rope_type='longrope'"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "rope_type='linear' needs factor, which is missing"),
        ({"rope_type": "default"}, "rope_type='default' needs rope_theta, which is missing"),
        ({**LLAMA3, "low_freq_factor": None}, "rope_type='llama3' needs low_freq_factor, which is missing"),
        ({**YARN, "long_factor": [1.0]}, "rope_parameters.long_factor=[1.0] has no meaning for rope_type='yarn'"),
        ({"rope_theta": 1e4, "factor": 2.0}, "rope_parameters.factor=2.0 has no meaning for rope_type='default'"),
        ({**YARN, "type": "linear"}, "rope_type='yarn' and its old name type='linear' must agree"),
    ],
)
def test_refused(rope: dict[str, Any], problem: str) -> None:
    assert [text for text in rope_problems(rope) if text.startswith(problem)]
    with pytest.raises(ConfigError):
        inverse_frequencies(rope, 16)
