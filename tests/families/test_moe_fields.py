"""Config fields of mixtures of experts: published forms, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from megabridge.errors import ConfigError
from megabridge.families import all_families, family_for
from megabridge.families.core.moe import SparseStep


def native(architecture: str, **changes: Any) -> dict[str, Any]:
    family = all_families()[architecture]
    return family.native({**family.tiny, **changes})


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"mlp_only_layers": [0, 3]}, [0, 1, 1, 0, 1]),
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1, 0]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 0, 0, 1, 0]),
    ],
)
def test_sparse_steps_in_both_directions(config: dict[str, Any], pattern: list[int]) -> None:
    read = SparseStep().read({"num_hidden_layers": 5, **config})
    assert read == {"moe_layer_freq": pattern}
    assert SparseStep().read({"num_hidden_layers": 5, **SparseStep().write(read)}) == read


def test_phi_in_its_published_form() -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    old = {"type": "longrope", **factors, "short_mscale": 1.25, "long_mscale": 1.25}
    config = {
        **all_families()["PhimoeForCausalLM"].tiny, "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe",
        "rope_parameters": None, "rope_theta": 1e4, "rope_scaling": old, "original_max_position_embeddings": 16,
    }  # fmt: skip
    family = family_for(config)
    rope = family.native(config)["rope"]
    expected = {**factors, "attention_factor": 1.25, "factor": 4.0, "original_max_position_embeddings": 16}
    assert rope == {"rope_type": "longrope", "rope_theta": 1e4, **expected}
    written = family.hf(family.native(config))
    assert family.native(written)["rope"] == rope
    assert written["rope_parameters"]["short_mscale"] == written["rope_parameters"]["long_mscale"] == 1.25
    assert "attention_factor" not in written["rope_parameters"]


def test_lists_with_an_entry_per_layer_mean_one_value() -> None:
    lists = {"moe_topk": [2] * 4, "num_shared_expert": [1] * 4, "moe_intermediate_size": [48] * 4}
    plain = native("HunYuanMoEV1ForCausalLM", moe_topk=2, num_shared_expert=None, moe_intermediate_size=None)
    assert native("HunYuanMoEV1ForCausalLM", **lists) == plain
    assert (plain["moe_router_topk"], plain["moe_ffn_hidden_size"], plain["moe_shared_expert_intermediate_size"]) == (2, 48, 48)


def test_a_count_of_experts_under_either_name() -> None:
    assert native("Qwen3MoeForCausalLM", num_experts=None, num_local_experts=16)["num_moe_experts"] == 16


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("HunYuanMoEV1ForCausalLM", {"moe_topk": [2, 2, 1, 2]}, "moe_topk=[2, 2, 1, 2]"),
        ("HunYuanMoEV1ForCausalLM", {"moe_intermediate_size": [32] * 4}, "moe_intermediate_size=[32, 32, 32, 32]"),
        ("HunYuanMoEV1ForCausalLM", {"num_shared_expert": 2}, "num_shared_expert=2"),
        ("HunYuanMoEV1ForCausalLM", {"use_qk_norm": False}, "use_qk_norm=False"),
        ("HunYuanMoEV1ForCausalLM", {"use_cla": True}, "use_cla=True"),
        ("PhimoeForCausalLM", {"num_experts_per_tok": 4}, "num_experts_per_tok=4"),
        (
            "PhimoeForCausalLM",
            {"rope_parameters": {"rope_type": "longrope", "short_mscale": 1.0, "long_mscale": 2.0}},
            "short_mscale=1.0, long_mscale=2.0",
        ),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ],
)
def test_what_cannot_be_represented_is_named(architecture: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        native(architecture, **change)
    assert message in str(caught.value)


def test_widths_that_config_json_has_one_key_for_must_be_equal() -> None:
    family = all_families()["HunYuanMoEV1ForCausalLM"]
    with pytest.raises(ConfigError, match="moe_shared_expert_intermediate_size=96"):
        family.hf({**family.native(family.tiny), "moe_shared_expert_intermediate_size": 96})
