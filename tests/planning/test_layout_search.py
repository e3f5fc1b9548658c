"""Memory by arithmetic against memory that is traced, and the search that uses both."""

from __future__ import annotations

from typing import Any

import pytest

from megabridge.config.plan_schema import PlanConfig
from megabridge.parallel.topology import Topology
from megabridge.planning.all_ranks import RankCost
from megabridge.planning.storage_time import storage_times
from tests.support.rank_server import RankServer

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECIPE = {"seq_length": 1024, "micro_batch_size": 2, "global_batch_size": 64}
# Layers are few so that it is quick; every kind of attention, MLP and mixture, and every way to cut them.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "single": ("llama32_1b", {}, {}),
    "recomputed": ("llama31_8b", {"pp": 2, "dp": 2}, {"provider": FULL}),
    "tp": ("llama31_8b", {"tp": 4, "sequence_parallel": True}, {}),
    "tp-without-sequence": ("llama31_8b", {"tp": 4}, {}),
    "tp-shares-groups": ("llama31_8b", {"tp": 16, "sequence_parallel": True}, {}),
    "pp": ("llama31_8b", {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}, {}),
    "lora": ("llama31_8b", {}, {"peft": {"name": "lora"}}),
    "float32": ("smollm2_135m", {"dp": 2}, {"dtype": "float32"}),
    "plain-mlp": ("starcoder2_3b", {"tp": 2}, {}),
    "mixture": ("qwen3_30b_a3b", {"ep": 8, "dp": 8}, {}),
    "mixture-tp": ("qwen3_30b_a3b", {"tp": 2, "ep": 4, "etp": 1, "dp": 2, "sequence_parallel": True}, {}),
    "mixture-etp": ("mixtral_8x7b", {"tp": 2, "ep": 4, "etp": 2, "dp": 4, "sequence_parallel": True}, {}),
    "latent": ("deepseek_v3", {"tp": 4, "pp": 2, "ep": 32, "etp": 1, "dp": 8, "sequence_parallel": True}, {}),
    "windows": ("gemma3_1b", {}, {}),
    "capped": ("gemma2_2b", {"tp": 2}, {}),
}


def test_estimated_memory_is_near_what_is_traced(ranks: RankServer) -> None:
    cases = [{"model": model, "parallel": parallel, "settings": settings} for model, parallel, settings in CASES.values()]
    (seen,) = ranks.run("tests.support.layout_memory:both", world_size=1, kwargs={"cases": cases, "recipe": RECIPE}, timeout=300)
    for name, (estimated, traced) in zip(CASES, seen, strict=True):
        assert estimated.keys() == traced.keys()
        for stage, exact in traced.items():
            guess = estimated[stage]
            if name != "lora":  # whose adapters are taken as whole
                assert guess["parameters"] == pytest.approx(exact["parameters"], rel=0.01), (name, stage)
                assert guess["optimizer"] == pytest.approx(exact["optimizer"], rel=0.01), (name, stage)
            total = sum(exact.values())
            assert sum(guess.values()) == pytest.approx(total, rel=0.01), (name, stage, guess, exact)


def test_storage_waits_for_the_busiest_host_or_for_all() -> None:
    def share(fed: int, written: int) -> RankCost:
        return RankCost(0, 0, fed, written, 0, 0, 0, 1)

    layout = Topology(tp=2, pp=2, dp=2)  # hosts of 4: a stage each
    shares = {0: share(8, 8), 1: share(6, 4), 4: share(4, 4), 5: share(4, 4)}
    plan = PlanConfig(storage_gbs=2e-9)
    read, written = storage_times(plan, layout, shares, per_host=4)
    assert (read.most_of_a_rank, read.most_of_a_host, read.total, read.seconds) == (8, 28, 44, 14.0), "replicas read, too"
    assert (written.most_of_a_rank, written.most_of_a_host, written.total, written.seconds) == (8, 12, 20, 6.0)
    both = storage_times(PlanConfig(storage_gbs=2e-9, storage_total_gbs=2.5e-9), layout, shares, per_host=4)
    assert [one.seconds for one in both] == [17.6, 8.0]
