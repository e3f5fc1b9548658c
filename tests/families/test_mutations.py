"""Every family takes its tiny config with keys missing, odd and contradictory: a ConfigError, or a model that can be represented."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import pytest

from megabridge.config.value_types import same
from megabridge.errors import ConfigError
from megabridge.families import all_families
from megabridge.families.core.family import Family
from megabridge.families.core.fields import Repeats, Unread
from megabridge.families.core.rope_types import _KINDS
from megabridge.families.core.unread_keys import is_harmless
from megabridge.models.provider import ModelProvider

_DEEP: list[Any] = []
for _ in range(2000):
    _DEEP = [_DEEP]
ODD: Final[list[Any]] = [
    None, True, False, 0, 1, -1, 3, 7, 64, 16384, 2**24, 10**30, -(2**63), 0.0, 0.5, -0.5, 1e-30, 1e300, float("nan"), float("inf"), 1e400,
    "", "x", "false", "128", "silu", "full_attention", "\ud800", [], [1], [0, 1], [-1] * 4, [10**30] * 4, [0.5], ["x"] * 4, [None] * 4,
    ["full_attention"] * 4, ["sliding_attention"] * 4, ["sparse"] * 4, [True] * 4, [[]], {}, {"a": 1}, {"rope_type": ["yarn"]},
    {"type": "linear", "rope_type": "yarn"}, {"rope_type": "linear", "factor": "2"}, {"full_attention": 5}, {"sliding_attention": None},
    {"quant_method": "fp8", "weight_block_size": [0, -1]}, {"quant_method": {}}, _DEEP, {"a": _DEEP}, (1, 2), {1, 2}, b"x", object(), 1j,
]  # fmt: skip
NAMES = sorted(all_families())


def mutants(family: Family, rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the key that changed, config) of single changes, and several at once under no key."""
    tiny = dict(family.tiny)
    keys = sorted(family.keys | tiny.keys())
    for key in keys:
        yield key, {name: value for name, value in tiny.items() if name != key}
        yield from ((key, {**tiny, key: value}) for value in rng.sample(ODD, 6))
    rope = tiny.get("rope_parameters")
    if isinstance(rope, dict):
        for place in ("rope_parameters", "rope_scaling"):
            yield from ((place, {**tiny, place: {**rope, name: rng.choice(ODD)}}) for name in (*_KINDS, "twist"))
    for name in ("a_new_key", "attn_output_gate"):
        yield from ((name, {**tiny, name: value}) for value in rng.sample(ODD, 3))
    for _ in range(40):
        yield "", {**tiny, **{key: rng.choice(ODD) for key in rng.sample(keys, 3)}}


@pytest.mark.parametrize("architecture", NAMES)
def test_a_mutated_config_is_refused_or_can_be_represented(architecture: str) -> None:
    family, rng = all_families()[architecture], random.Random(15)
    accepted = refused = 0
    for key, config in mutants(family, rng):
        try:
            native = family.native(config)
        except ConfigError as error:
            refused += 1
            assert str(error).startswith(f"{architecture}: ") and len(str(error)) < 8000, key
            continue
        accepted += 1
        json.dumps(native, allow_nan=False)
        assert family.native(family.hf(native)) == native, f"{key}={config.get(key)!r} doesn't come back"
        with suppress(ConfigError):  # sizes that don't fit each other
            ModelProvider(native, family_name=architecture).finalize()
    assert accepted > 20 and refused > 150


# Other values, of the kinds that keys hold.
OTHERS: Final[list[Any]] = [
    True, False, 2, 3, 5, 24, 0.3, 2.0, "gelu", "silu", "greedy", ["sliding_attention"] * 4, ["sparse"] * 4, [1, 0, 1, 1],
]  # fmt: skip
# Keys, of all architectures or of one, that can change without another model, and beside or because of what.
NO_TRACE: Final = {
    "original_max_position_embeddings": "no rotary embedding that needs it",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "max_window_layers": "layer_types, or windows that are off",
    "Qwen3ForCausalLM.sliding_window": "use_sliding_window, which is false",
    "Qwen3MoeForCausalLM.sliding_window": "use_sliding_window, which is false",
    "Qwen3ForCausalLM.use_sliding_window": "no window",
    "Qwen3MoeForCausalLM.use_sliding_window": "no window",
    "ExaoneMoeForCausalLM.first_k_dense_replace": "mlp_layer_types",
    "Llama4ForCausalLM.interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
    "Llama4ForCausalLM.attn_temperature_tuning": "any number but 0 is as good as true",
    "Ernie4_5_MoeForCausalLM.moe_layer_end_index": "any beyond the last layer is as good as the last",
    "GemmaForCausalLM.hidden_act": "gelu means the tanh approximation there",
    **{f"Gemma{n}ForCausalLM.hidden_activation": "gelu means the tanh approximation there" for n in (2, 3)},
    "use_bidirectional_attention": "false is as good as null",
}


@pytest.mark.parametrize("architecture", NAMES)
def test_another_value_of_a_computing_key_is_another_model(architecture: str) -> None:
    family = all_families()[architecture]
    tiny, notes = (
        dict(family.tiny),
        set[str]().union(*(each.keys() for each in family.fields if isinstance(each, Repeats | Unread))),
    )
    native, unseen = family.native(tiny), set()
    written = family.hf(native)  # what keys mean where they are absent
    for key in sorted(family.keys - notes):
        for value in OTHERS:
            if same(value, tiny.get(key, written.get(key))) or (is_harmless(key) and key != "initializer_range"):
                continue
            try:
                unseen |= {key} if family.native({**tiny, key: value}) == native else set()
            except ConfigError:
                continue
    assert not {key for key in unseen if key not in NO_TRACE and f"{architecture}.{key}" not in NO_TRACE}
