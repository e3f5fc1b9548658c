"""The plan of a whole job in one process against what real ranks find; proofs that fail where something is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from megabridge.families import all_families
from megabridge.parallel.topology import Topology
from tests.support.models import TINY, TINY_MIXTURE
from tests.support.rank_server import RankServer

CASES = "tests.support.world"
# Padded rows (131 at tp 2 and 4), fewer KV heads than ranks, tied copies on the last stage, uneven stages, replicas.
LAYOUTS: list[tuple[Topology, dict[str, Any], str]] = [
    (Topology(tp=2, pp=2, vpp=2), {}, "bfloat16"),
    (Topology(tp=4), {"num_key_value_heads": 2}, "float32"),
    (Topology(pp=2, dp=2), {"tie_word_embeddings": True, "num_hidden_layers": 3}, "float32"),
    (Topology(tp=2, dp=2), {"num_key_value_heads": 1, "attention_bias": False}, "bfloat16"),
]
# All experts in one parameter, and a parameter for each.
MIXTURES = [
    (layout, backend)
    for layout in (
        Topology(ep=2, dp=2),
        Topology(tp=2, ep=2, etp=1),
        Topology(tp=2, ep=2, dp=2),
        Topology(tp=2, etp=1, ep=4, dp=2),
        Topology(pp=2, vpp=2, ep=2, dp=2),
    )
    for backend in ("torch", "local")
    if backend == "torch" or layout.tp == 1  # megatron-core's mixtures under tp need sequence parallelism, its local spec has none
]


def mixture(name: str, **changes: Any) -> dict[str, Any]:
    """A tiny config with experts, with as many layers as no two stages share."""
    family = all_families()[name]
    return {"architectures": [name], "model_type": family.model_type, **family.tiny, "num_hidden_layers": 5, **changes}


# Multi-token prediction, which has the embedding again on the last stage, and latent attention.
AHEAD: list[tuple[Topology, dict[str, Any]]] = [
    (Topology(tp=2, ep=2, dp=2), mixture("DeepseekV3ForCausalLM")),
    (Topology(pp=2, ep=2, vpp=2, dp=2), mixture("DeepseekV3ForCausalLM")),
]


@pytest.fixture(scope="module")
def in_one(ranks: RankServer) -> list[dict[str, Any]]:
    cases = [{"config": {**TINY, **changes}, "dtype": dtype, "layout": layout} for layout, changes, dtype in LAYOUTS]
    (seen,) = ranks.run(f"{CASES}:seen_by_one_of_many", world_size=1, kwargs={"cases": cases})
    return seen


@pytest.mark.parametrize("number", range(len(AHEAD)), ids=[str(layout) for layout, _ in AHEAD])
def test_so_it_does_of_layers_that_predict_further(ranks: RankServer, number: int) -> None:
    layout, config = AHEAD[number]
    kwargs = {"config": config, "dtype": "float32", "mtp_num_layers": 1}
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


@pytest.fixture(scope="module")
def mixtures_in_one(ranks: RankServer) -> list[dict[str, Any]]:
    cases = [{"config": TINY_MIXTURE, "dtype": "bfloat16", "layout": layout, "backend": backend} for layout, backend in MIXTURES]
    (seen,) = ranks.run(f"{CASES}:seen_by_one_of_many", world_size=1, kwargs={"cases": cases})
    return seen


@pytest.mark.parametrize("number", range(len(MIXTURES)), ids=[f"{layout}-{backend}" for layout, backend in MIXTURES])
def test_one_process_knows_where_experts_are(ranks: RankServer, mixtures_in_one: list[dict[str, Any]], number: int) -> None:
    layout, backend = MIXTURES[number]
    one = mixtures_in_one[number]
    kwargs = {"config": TINY_MIXTURE, "dtype": "bfloat16", "backend": backend}
    every = ranks.run(f"{CASES}:seen_by_ranks", topology=layout, kwargs=kwargs)
    assert one["records"] == [seen["records"] for seen in every]
    writers = max(layout.tp, layout.expert_tp * layout.ep)
    for rank, seen in enumerate(every):
        assert seen["sources"] == one["sources"] and list(seen["tensors"].items()) == list(one["tensors"].items())
        stage, inside = divmod(rank, layout.stage_size)
        share = one["shares"][stage * layout.stage_size + inside % writers]
        expected = {**share, **({} if inside < writers else {"written_bytes": 0})}
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
    assert said.startswith("ConfigError: ranks that don't run are planned in a process without groups")
