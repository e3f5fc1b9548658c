"""Config fields: both directions, and refusals that name key and value."""

from typing import Any

import pytest

from megabridge.errors import ConfigError
from megabridge.families import all_families, family_for, register
from megabridge.families.core.family import Family
from megabridge.families.core.registry import _registered
from megabridge.families.core.unread_keys import is_harmless
from megabridge.families.llama import FAMILY


def tiny(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **FAMILY.tiny, **changes}


@pytest.mark.parametrize("family", all_families().values(), ids=lambda family: family.architecture)
def test_config_round_trip(family: Family) -> None:
    native = family.native(family.tiny)
    assert family.native(family.hf(native)) == native
    written = family.hf(native)
    kept = {key: value for key, value in family.tiny.items() if not is_harmless(key)}
    assert {key: written[key] for key in kept} == kept


def test_defaults_are_transformers_own() -> None:
    native = FAMILY.native(
        {key: value for key, value in tiny().items() if key not in ("num_key_value_heads", "head_dim", "rms_norm_eps")}
    )
    assert (native["num_query_groups"], native["kv_channels"], native["layernorm_epsilon"]) == (8, 8, 1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": None, "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "attention_factor": None}},
         {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}),
        ({"rope_parameters": None}, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)  # fmt: skip
def test_rope_in_old_and_new_files(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert FAMILY.native(tiny(**config))["rope"] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type='spiral'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type='llama3' needs high_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 3}}, "twist=3"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method='awq'"),
        ({"hidden_size": None}, "'hidden_size'"),
    ],
)
def test_what_cannot_be_represented_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILY.native(tiny(**change))
    assert message in str(caught.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILY.native(tiny(hidden_act="relu", sliding_window=1, vocab_size=None))
    assert all(name in str(caught.value) for name in ("hidden_act", "sliding_window", "vocab_size"))


def test_a_setting_that_training_changed_to_something_unwritable_is_refused() -> None:
    with pytest.raises(ConfigError, match="normalization='LayerNorm'"):
        FAMILY.hf({**FAMILY.native(tiny()), "normalization": "LayerNorm"})


def test_unknown_architectures_show_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'LlamaForCausalML' is not supported; did you mean LlamaForCausalLM"):
        family_for({"architectures": ["LlamaForCausalML"]})
    with pytest.raises(ConfigError, match=r"did you mean LlamaForCausalLM") as misspelt:
        family_for({"architectures": ["LlamaModel"], "model_type": "llama"})
    assert " are: docs/models.md" not in str(misspelt.value)
    for name in ("BloomForCausalLM", "MPTForCausalLM", "RwkvForCausalLM", "T5ForConditionalGeneration"):
        with pytest.raises(ConfigError) as caught:
            family_for({"architectures": [name]})
        assert "did you mean" not in str(caught.value), name
        assert f"; {len(all_families())} are: docs/models.md and AutoBridge.list_supported_models() name them." in str(caught.value)
    with pytest.raises(ConfigError, match="must name an architecture"):
        family_for({"model_type": "nothing"})
    assert family_for({"model_type": "llama", "architectures": None}) is FAMILY


def test_a_family_can_be_registered() -> None:
    other = Family("OtherForCausalLM", "other", FAMILY.fields, FAMILY.weights, FAMILY.tiny)
    register(other)
    try:
        assert family_for({"architectures": ["OtherForCausalLM"]}) is other
    finally:
        _registered.clear()
