"""Rules are looked up by canonical native name and read in both directions."""

from dataclasses import replace

import pytest

from megabridge.errors import MappingError
from megabridge.families.llama import FAMILY
from megabridge.mapping import Dims, Fuse, PerRow, WeightMap, block, natural, weight

DIMS = Dims(4, 32, 8, 4, 131, tied=False)


def test_names_keep_their_numbers() -> None:
    found = FAMILY.weights.resolve("decoder.layers.12.self_attention.linear_qkv.weight", DIMS)
    assert found is not None
    assert found.hf == tuple(f"model.layers.12.self_attn.{p}_proj.weight" for p in "qkv")


def test_alternative_names_lead_to_the_same_tensor() -> None:
    for name in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        found = FAMILY.weights.resolve(f"decoder.layers.3.{name}", DIMS)
        assert found is not None and found.hf == ("model.layers.3.input_layernorm.weight",)


def test_one_expert_is_a_row_of_all() -> None:
    rules = WeightMap(
        block("l.{layer}", "m.{layer}", weight("experts.fc.w", "e.{expert}.g", "e.{expert}.u", layout=PerRow(3, Fuse())))
    )
    for name in ("l.2.experts.7.fc.w", "l.2.experts.fc.w"):
        found = rules.resolve(name, DIMS)
        assert found is not None
        assert found.names(6) == tuple(f"m.2.e.{expert}.{part}" for expert in range(3) for part in "gu")


def test_the_output_layer_is_a_copy_only_when_tied() -> None:
    free, tied = (FAMILY.weights.resolve("output_layer.weight", dims) for dims in (DIMS, replace(DIMS, tied=True)))
    assert free is not None and free.hf == ("lm_head.weight",) and not free.is_tied_copy
    assert tied is not None and tied.hf == ("model.embed_tokens.weight",) and tied.is_tied_copy
    assert FAMILY.weights.aliases(replace(DIMS, tied=True), {"model.embed_tokens.weight"}) == {
        "lm_head.weight": "model.embed_tokens.weight"
    }


def test_unknown_names_and_double_rules() -> None:
    assert FAMILY.weights.resolve("decoder.layers.1.self_attention.linear_q.weight", DIMS) is None
    with pytest.raises(MappingError, match="two rules map"):
        WeightMap(weight("a.{layer}.w", "x.{layer}"), weight("a.{layer}.w", "y.{layer}"))


def test_layers_sort_by_number() -> None:
    names = ["m.10.w", "m.2.w", "a.w", "m.2.b"]
    assert sorted(names, key=natural) == ["a.w", "m.2.b", "m.2.w", "m.10.w"]
