"""The plan of a whole job in one process against what real ranks find; proofs that fail where something is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from megabridge.families import all_families
from megabridge.topology import Topology
from tests.cases.models import TINY
from tests.ranks import RankServer

CASES = "tests.cases.world"
# Padded rows (131 at tp 2 and 4), fewer KV heads than ranks, tied copies on the last stage, uneven stages, replicas.
LAYOUTS: list[tuple[Topology, dict[str, Any], str]] = [
    (Topology(tp=2, pp=2, vpp=2), {}, "bfloat16"),
    (Topology(tp=4), {"num_key_value_heads": 2}, "float32"),
    (Topology(pp=2, dp=2), {"tie_word_embeddings": True, "num_hidden_layers": 3}, "float32"),
    (Topology(tp=2, dp=2), {"num_key_value_heads": 1, "attention_bias": False}, "bfloat16"),
]


def mixture(name: str, **changes: Any) -> dict[str, Any]:
    """A tiny config with experts, with as many layers as no two stages share."""
    family = all_families()[name]
    return {"architectures": [name], "model_type": family.model_type, **family.tiny, "num_hidden_layers": 5, **changes}


# Experts over ep, cut or whole, stacked or one by one, with the layer of multi-token prediction that has the embedding again.
MIXTURES: list[tuple[Topology, dict[str, Any], dict[str, Any]]] = [
    (Topology(ep=2, dp=4), mixture("MixtralForCausalLM"), {"backend": "local"}),
    (Topology(tp=2, ep=2, etp=1, dp=2), mixture("MixtralForCausalLM"), {}),
    (Topology(tp=2, ep=2, dp=2), mixture("DeepseekV3ForCausalLM"), {"mtp_num_layers": 1}),
    (Topology(pp=2, ep=2, vpp=2, dp=2), mixture("DeepseekV3ForCausalLM"), {"mtp_num_layers": 1}),
]


@pytest.fixture(scope="module")
def in_one(ranks: RankServer) -> list[dict[str, Any]]:
    cases = [{"config": {**TINY, **changes}, "dtype": dtype, "layout": layout} for layout, changes, dtype in LAYOUTS]
    (seen,) = ranks.run(f"{CASES}:seen_by_one_of_many", world_size=1, kwargs={"cases": cases})
    return seen


@pytest.mark.parametrize("number", range(len(MIXTURES)), ids=[str(layout) for layout, _, _ in MIXTURES])
def test_so_it_does_with_experts(ranks: RankServer, number: int) -> None:
    layout, config, settings = MIXTURES[number]
    kwargs = {"config": config, "dtype": "float32", **settings}
    (one,) = ranks.run(f"{CASES}:seen_by_one", world_size=1, kwargs={**kwargs, "layout": layout})
    every = ranks.run(f"{CASES}:seen_by_ranks", topology=layout, kwargs=kwargs)
    assert one["records"] == [seen["records"] for seen in every]
    inside = max(layout.tp, layout.expert_tp * layout.ep)  # ranks of a stage that hold different things
    for rank, seen in enumerate(every):
        assert seen["sources"] == one["sources"] and list(seen["tensors"].items()) == list(one["tensors"].items())
        stage, place = divmod(rank, layout.stage_size)
        expected = {**one["shares"][stage * layout.stage_size + place % inside]}
        if place >= inside:
            expected["written_bytes"] = 0
        assert seen["share"] == {key: expected[key] for key in seen["share"]}


# (model, layout, billions of parameters, tensors, experts)
PUBLISHED = [
    ("deepseek_v3", Topology(tp=8, pp=16, ep=64, etp=1, dp=16), 671.0, 45_395, 58 * 256),
    ("deepseek_v3", Topology(tp=4, pp=8, ep=16, etp=4, dp=64), 671.0, 45_395, 58 * 256),
    ("qwen3_235b_a22b", Topology(tp=4, pp=8, ep=32, etp=1, dp=16), 235.1, 36_945, 94 * 128),
    ("gpt_oss_120b", Topology(tp=4, pp=4, ep=16, etp=1, dp=8), 116.8, 615, 0),
    ("glm45", Topology(tp=8, pp=7, ep=32, etp=1, dp=8), 352.8, 43_190, 89 * 160),
]


def test_published_mixtures_are_proven_in_one_process(ranks: RankServer) -> None:
    (found,) = ranks.run(f"{CASES}:published", world_size=1, kwargs={"cases": [case[:2] for case in PUBLISHED]}, timeout=500)
    for (name, layout, billions, tensors, experts), seen in zip(PUBLISHED, found, strict=True):
        assert abs(seen["parameters"] / 1e9 - billions) < 0.06, (name, layout, seen)
        assert (seen["tensors"], seen["experts"], seen["written"]) == (tensors, experts, seen["parameters"]), (name, layout, seen)
        assert seen["seconds"] < 60 and seen["gib"] < 4, (name, layout, seen)  # of this process alone, other loads aside


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout, _, _ in LAYOUTS])
def test_one_process_knows_what_every_rank_finds(ranks: RankServer, in_one: list[dict[str, Any]], number: int) -> None:
    layout, changes, dtype = LAYOUTS[number]
    one = in_one[number]
    every = ranks.run(f"{CASES}:seen_by_ranks", topology=layout, kwargs={"config": {**TINY, **changes}, "dtype": dtype})
    assert one["records"] == [seen["records"] for seen in every]
    for rank, seen in enumerate(every):
        assert seen["sources"] == one["sources"] and list(seen["tensors"].items()) == list(one["tensors"].items())
        place = layout.coordinate(rank)
        share = one["shares"][layout.rank(tp=place.tp, pp=place.pp)]
        expected = {**share, **({} if place.dp == 0 else {"written_bytes": 0})}
        assert seen["share"] == {key: expected[key] for key in seen["share"]}


def test_thousands_of_ranks_are_proven_in_one_process(ranks: RankServer) -> None:
    layout = Topology(tp=8, pp=16, dp=16)
    config = {**TINY, "num_hidden_layers": 32, "num_key_value_heads": 8}
    (seen,) = ranks.run(f"{CASES}:large", world_size=1, kwargs={"config": config, "layout": layout})
    assert seen["written"] == seen["bytes"]
    assert seen["writers"] == [layout.rank(tp=tp, pp=pp) for pp in range(16) for tp in range(8)]
    assert seen["last"].name == "output_layer.weight" and not seen["last"].is_writer and seen["last"].cuts[0].index == 7
    assert 1 < seen["files"] < 16


def test_what_does_not_tile_is_named(ranks: RankServer) -> None:
    (said,) = ranks.run(f"{CASES}:damaged", world_size=1, kwargs={"config": TINY})
    layer = "model.layers.1"
    for name, parts in {
        "lost": [f"{layer}.mlp.gate_proj.weight (96, 64): [48:96, 0:64] belongs to no boxes", f"{layer}.mlp.up_proj.weight"],
        "twice": ["model.norm.weight (64,): [0:64] belongs to 2 boxes"],
        "same share": [f"{layer}.mlp.down_proj.weight (64, 96): [0:64, 0:48] belongs to 2 boxes"],
        "stride": ["self_attn.q_proj.weight (128, 64)", "boxes"],
        "shape": ["self_attn.o_proj.weight as torch.float32 (128, 128), another rank or parameter as torch.float32 (64, 128)"],
        "unknown": ["no rule of LlamaForCausalLM feeds the parameter decoder.wings.weight (64,)"],
        "dtype": ["self_attn.o_proj.weight as torch.float16"],
    }.items():
        assert said[name].startswith("MappingError: "), name
        assert all(part in said[name] for part in parts), f"{name}: {said[name]}"


def test_a_process_with_groups_imagines_no_others(ranks: RankServer) -> None:
    (said,) = ranks.run(f"{CASES}:refused_with_groups", topology=Topology(), kwargs={"config": TINY})
    assert said.startswith("ConfigError: ranks that don't run are imagined in a process without groups")
