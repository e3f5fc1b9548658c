"""What a bridge makes of a config before any weight moves: odd content, keys that nothing reads, and the tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabridge import AutoBridge
from megabridge.bridge import source as source_of
from megabridge.errors import CheckpointError, ConfigError
from megabridge.families.llama import FAMILY
from megabridge.hf.assets import end_tokens

TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **FAMILY.tiny}
GATED = {**TINY, "attn_output_gate": True, "sliding_window": None}
NESTED = "[" * 900 + "]" * 900


def folder(path: Path, content: Any, name: str = "config.json") -> Path:
    path.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


ODD = [
    {}, {"architectures": 5}, {"architectures": [5]}, {"architectures": "LlamaForCausalLM"}, {"architectures": [[]]}, {"model_type": {}},
    {"architectures": [], "model_type": []}, {"architectures": ["Nothing\n\ud800"]}, {**TINY, "model_type": 7},
    {**TINY, "model_type": "mixtral"}, {**TINY, "num_hidden_layers": 10**30}, {**TINY, "num_hidden_layers": True},
    {**TINY, "hidden_size": -64}, {**TINY, "rms_norm_eps": float("nan")}, {**TINY, "rms_norm_eps": "x"}, {**TINY, "rms_norm_eps": 1e400},
    {**TINY, "attention_bias": "false"}, {**TINY, "rope_parameters": [1]}, {**TINY, "vocab_size": [131]}, {**TINY, "torch_dtype": ["x"]},
    {**TINY, "torch_dtype": "complex64"}, {**TINY, "quantization_config": [[]]}, {**TINY, "eos_token_id": "</s>"}, GATED,
    {**TINY, "num_attention_heads": 2**24, "num_key_value_heads": 3}, {**TINY, "head_dim": 15},
]  # fmt: skip


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_what_does_not_convert_is_answered_with_no(content: dict[str, Any], tmp_path: Path) -> None:
    assert not AutoBridge.supports(content)
    assert not AutoBridge.can_handle(folder(tmp_path, content))
    with pytest.raises(ConfigError) as caught:
        bridge = AutoBridge.from_hf_pretrained(tmp_path)
        bridge.provider().finalize()
    assert len(str(caught.value)) < 6000


def test_what_is_no_config_at_all() -> None:
    assert [AutoBridge.supports(config) for config in (None, 5, "LlamaForCausalLM", [], object())] == [False] * 5
    with pytest.raises(ConfigError, match="must be a dict or a config object of transformers, not 5"):
        AutoBridge.from_hf_config(5)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", '{"a": ' + "[" * 10**5 + "}", "\udc00"]
)
def test_a_broken_file_is_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        AutoBridge.can_handle(folder(tmp_path, text))


def test_a_file_that_is_nested_deeply_is_answered_with_no(tmp_path: Path) -> None:
    for key in ("a_key", "task_specific_params", "rope_parameters", "vocab_size"):
        text = json.dumps({**TINY, key: "HERE"})
        assert not AutoBridge.can_handle(folder(tmp_path, text.replace('"HERE"', NESTED)))
        with pytest.raises(ConfigError, match=f"'{key}' is nested too deeply"):
            AutoBridge.from_hf_pretrained(tmp_path)


def test_keys_to_ignore_hold_wherever_the_config_is_read(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", GATED)
    with pytest.raises(ConfigError, match=r"attn_output_gate=True .* name it in ignore_keys"):
        AutoBridge.from_hf_pretrained(source)
    keys = ["attn_output_gate"]
    assert AutoBridge.supports(GATED, ignore_keys=keys) and AutoBridge.can_handle(source, ignore_keys=keys)
    bridge = AutoBridge.from_hf_pretrained(source, ignore_keys=keys)
    assert bridge.source.native == FAMILY.native(TINY) and bridge.source.unread == ["attn_output_gate", "sliding_window"]
    source_of.check_same(bridge.source, GATED, "the same")
    provider = bridge.provider()
    provider.finalize()
    assert provider.describe().endswith("; nothing reads config.json's 'attn_output_gate', 'sliding_window'")
    target = tmp_path / "target"
    target.mkdir()
    bridge.write_hf_assets(target)
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert AutoBridge.from_hf_config(GATED, ignore_keys=keys[0]).source.ignore_keys == keys[0], "one name is a collection too"


def test_contradicting_names_of_the_architecture_are_refused() -> None:
    with pytest.raises(ConfigError, match="model_type='mixtral', which is that of MixtralForCausalLM, contradict"):
        AutoBridge.from_hf_config({**TINY, "model_type": "mixtral"})
    assert AutoBridge.supports({**TINY, "model_type": "a_name_of_its_own"})


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 2, {2}), (None, [2, 3], {2, 3}), (None, None, set()), ({"eos_token_id": [7, 8]}, 2, {7, 8}), ({}, 2, set()),
        (None, "2", "eos_token_id='2'"), ({"eos_token_id": [True]}, 2, "generation_config.json: eos_token_id="),
        ({"eos_token_id": 10**30}, 2, "eos_token_id="),
    ],
)  # fmt: skip
def test_the_tokens_that_end_a_text(generation: Any, config: Any, expected: Any, tmp_path: Path) -> None:
    if generation is not None:
        folder(tmp_path, generation, "generation_config.json")
    content = {} if config is None else {"eos_token_id": config}
    if isinstance(expected, set):
        assert end_tokens(tmp_path, content) == expected
        return
    with pytest.raises(ConfigError, match=expected):
        end_tokens(tmp_path, content)
