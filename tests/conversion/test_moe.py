"""Mixtures of experts through the engine: every way out, the bytes that a rank reads, random shapes and layouts, memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megabridge.hf.tensor_files import find_tensors
from megabridge.parallel.topology import Topology
from tests.support.covering import further
from tests.support.models import mixtral_config
from tests.support.payload import payload
from tests.support.rank_server import RankServer
from tests.support.stream_checks import check_tasks, files

CASES = "tests.support.moe"
SEEDS = [1, 2]
# Per-expert tensors, a tensor of all experts, the same transposed, and with gate and up in turn.
FILES = ["MixtralForCausalLM", "GraniteMoeForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM"]


@pytest.fixture(scope="module")
def models(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    ranks.run(
        f"{CASES}:make", kwargs={"root": str(root), "configs": {str(seed): mixtral_config(seed) for seed in SEEDS}, "names": FILES}
    )
    return root


@pytest.mark.parametrize("layout", [Topology(tp=2, ep=2, dp=2), *further(Topology(ep=2, dp=2))], ids=["etp2ep2", "ep2"])
def test_every_way_out_gives_the_tensors_of_the_files(ranks: RankServer, models: Path, layout: Topology) -> None:
    sources = [*map(str, SEEDS), "GraniteMoeForCausalLM"]
    results = ranks.run(
        "tests.support.stream:streams", topology=layout, kwargs={"sources": [str(models / name) for name in sources]}
    )
    last = layout.world_size - 1
    for number, source in enumerate(sources):
        expected = files(models / source)
        for rank, seen in enumerate(result[number] for result in results):
            assert seen["whole"] == seen["small"] == seen["buckets"] == expected
            assert seen["single"] == (expected if rank == last else [])
            assert sorted(seen["shards"]) == sorted(expected)
            check_tasks(seen["tasks"], expected, layout)


@pytest.mark.parametrize(
    "layout", [Topology(ep=2, dp=2), Topology(ep=4, dp=4), Topology(tp=2, dp=2, ep=2), Topology(tp=2, ep=2, etp=1)], ids=str
)
def test_a_rank_reads_the_experts_it_holds(ranks: RankServer, models: Path, layout: Topology) -> None:
    names = [name for name in FILES if layout.expert_tp == 1 or not name.startswith("GptOss")]
    results = ranks.run(f"{CASES}:moved", topology=layout, kwargs={"sources": [str(models / name) for name in names]})
    for number, name in enumerate(names):
        for rank in results:
            seen = rank[number]
            assert 0.25 * seen["held"] < seen["owned"] <= seen["held"], "ranks hold a part, and all of it comes from files"
            assert seen["copied"] == seen["owned"], f"{name}: copies {seen['copied']} bytes and owns {seen['owned']}"
            assert seen["read"] <= 1.02 * seen["owned"], f"{name}: reads {seen['read']} bytes, owns {seen['owned']}"
        payload = sum(info.nbytes for info in find_tensors(models / name).values())
        (fetched,) = results[0][number]["fetched"]
        assert payload <= fetched <= payload + 8 * 4096, f"{name}: the node touches {fetched} bytes of {payload}"


def layouts(seed: int, count: int) -> list[Topology]:
    """Random layouts of at most eight ranks, in which experts are shared."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        tp, etp, ep, pp, vpp, dp = (draw.choice(sizes) for sizes in ((1, 2), (1, 2), (1, 2, 4), (1, 2), (1, 2), (1, 2, 4)))
        stage = tp * dp
        if stage * pp <= 8 and stage % (etp * ep) == 0 and etp * ep > 1 and (pp > 1 or vpp == 1):
            layout = Topology(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=dp)
            found += [layout] if layout not in found else []
    return found


DRAWN = layouts(5, 6)


@pytest.mark.parametrize("layout", [*DRAWN[:2], *further(*DRAWN[2:])], ids=str)
def test_random_mixtures_come_back_byte_for_byte(ranks: RankServer, tmp_path: Path, layout: Topology) -> None:
    seeds = [100 + sum(map(ord, str(layout))) * 10 + number for number in range(6)]
    configs = {str(seed): mixtral_config(seed) for seed in seeds}
    ranks.run(f"{CASES}:make", kwargs={"root": str(tmp_path / "in"), "configs": configs, "names": []}, timeout=300)
    kwargs = {"root": str(tmp_path / "in"), "out": str(tmp_path / "out"), "names": list(configs)}
    results: list[list[dict[str, Any]]] = ranks.run(f"{CASES}:round_trips", topology=layout, kwargs=kwargs, timeout=300)
    for number, (name, config) in enumerate(configs.items()):
        assert payload(tmp_path / "out" / name) == payload(tmp_path / "in" / name), config
        for rank in results:
            assert rank[number]["mismatched"] == () and rank[number]["logits"] <= 1e-4 * max(1.0, rank[number]["scale"]), config


def test_memory_of_an_export_does_not_grow_with_the_experts(ranks: RankServer, tmp_path: Path) -> None:
    few, many = (
        ranks.run(f"{CASES}:memory", kwargs={"root": str(tmp_path / str(count)), "experts": count}, timeout=300)[0]
        for count in (4, 32)
    )
    assert many["model"] > 5 * few["model"]
    for way in ("import", "export"):
        assert many[way] < few[way] + (24 << 20), (few, many)


def test_native_checkpoints_of_one_call_take_expert_sizes(ranks: RankServer, models: Path, tmp_path: Path) -> None:
    for name in ("1", "GraniteMoeForCausalLM"):
        out = tmp_path / name
        kwargs = {"source": str(models / name), "out": str(out)}
        first, second = ranks.run(f"{CASES}:one_call", world_size=2, kwargs=kwargs)
        assert first == second and any(".experts." in native for native in first)
        assert payload(out / "ep2") == payload(out / "pp2") == payload(models / name)
