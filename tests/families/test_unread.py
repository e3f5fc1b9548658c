"""Keys that no field reads: refused unless they are known to be harmless, say nothing, or say what transformers takes for granted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megabridge.errors import ConfigError
from megabridge.families import all_families
from megabridge.families.llama import FAMILY
from tests.support.published import EXTRAS


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        FAMILY.native({**FAMILY.tiny, **changes})
    return str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_output_gate": True}, {"qkv_bias": True}, {"attention_sink": 4}, {"attention_sinks": True}, {"num_experts": 8},
        {"residual_gain": 0.5}, {"position_embedding_type": "alibi"}, {"norm_placement": "post"}, {"mlp": {"experts": 8}},
        {"layer_pattern": ["mamba", "attention"]}, {"layer_types": ["sliding_attention"] * 4}, {"no_rope_layers": [1, 1, 1, 0]},
        {"rotary_pct": 0.5}, {"is_causal": False}, {"is_encoder_decoder": True}, {"per_layer_config": {"0": {"hidden_size": 8}}},
        {"a\nkey of any name": 1}, {"loop_count": float("nan")}, {"twice": -1},
    ],
)  # fmt: skip
def test_a_key_that_may_change_what_is_computed_is_refused(change: dict[str, Any]) -> None:
    message = refusal(**change)
    assert message.startswith("LlamaForCausalLM: ") and repr(next(iter(change)))[1:-1] in message and "\n" not in message


def test_all_such_keys_come_at_once_beside_other_problems() -> None:
    message = refusal(
        attn_output_gate=True, attention_sink=4, hidden_act="relu", vocab_size=-1, rope_parameters={"rope_type": "spiral"}
    )
    wanted = (
        "attn_output_gate=True",
        "attention_sink=4",
        "hidden_act='relu'",
        "vocab_size=-1",
        "rope_type='spiral'",
        "ignore_keys",
    )
    assert all(part in message for part in wanted)


def test_what_says_nothing_is_reported_and_what_is_known_to_be_harmless_is_not() -> None:
    off = {"attn_output_gate": False, "attention_sink": None, "num_experts": 0, "layer_pattern": [], "mlp": {}, "kind": ""}
    harmless: dict[str, Any] = {
        "_name_or_path": "x", "auto_map": {"AutoConfig": "a.B"}, "torch_dtype": "bfloat16", "transformers_version": "4.40",
        "use_cache": True, "pretraining_tp": 2, "unsloth_version": "2025.1", "attention_dropout": 0.1, "sep_token_id": 7,
        "temperature": 0.7, "_flash_attn_2_enabled": True, "id2label": {"0": "a"}, "transformers.js_config": {"dtype": "q4"},
    }  # fmt: skip
    assert FAMILY.native({**FAMILY.tiny, **off, **harmless}) == FAMILY.native(FAMILY.tiny)
    assert FAMILY.unread({**FAMILY.tiny, **off, **harmless}) == sorted(off)


def test_a_key_of_transformers_own_class_must_have_its_default() -> None:
    mixtral, neox = all_families()["MixtralForCausalLM"], all_families()["GPTNeoXForCausalLM"]
    assert mixtral.native({**mixtral.tiny, "num_experts": 8}) == mixtral.native(mixtral.tiny)  # another name of num_local_experts
    with pytest.raises(ConfigError, match="num_experts=4 can't be represented: it must be 8, as in transformers"):
        mixtral.native({**mixtral.tiny, "num_experts": 4})
    key = "use_parallel_residual"
    unaware = replace(neox, fields=tuple(field for field in neox.fields if key not in set(field.keys())))
    assert unaware.native({**neox.tiny, key: True})
    with pytest.raises(ConfigError, match=f"{key}=False can't be represented: it must be True, as in transformers"):
        unaware.native({**neox.tiny, key: False})


def test_the_user_can_say_that_a_key_changes_nothing() -> None:
    config = {**FAMILY.tiny, "attn_output_gate": True, "qkv_bias": True}
    assert FAMILY.native(config, ignore=["attn_output_gate", "qkv_bias"]) == FAMILY.native(FAMILY.tiny)
    with pytest.raises(ConfigError, match="qkv_bias=True"):
        FAMILY.native(config, ignore=["attn_output_gate"])
    with pytest.raises(ConfigError, match="ignore_keys=hidden_size must name keys that nothing reads"):
        FAMILY.native(FAMILY.tiny, ignore=["hidden_size"])


@pytest.mark.parametrize("architecture", sorted(EXTRAS))
def test_keys_of_published_files_are_known(architecture: str) -> None:
    family = all_families()[architecture]
    config = {**family.tiny, **EXTRAS[architecture]}
    native = family.native(config)
    assert family.unread(config) == []
    assert {key: value for key, value in native.items() if family.native(family.tiny)[key] != value}.keys() <= {
        "rope",
        "rotary_percent",
    }


@pytest.mark.parametrize("architecture", sorted(all_families()))
def test_every_key_of_transformers_class_is_known(architecture: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = all_families()[architecture]
    config = json.loads(CONFIG_MAPPING[family.model_type]().to_json_string(use_diff=False))
    family.native({**config, "architectures": [architecture]})
    assert family.unread(config) == []
