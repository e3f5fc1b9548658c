"""Model FLOPs against formulas by hand, what a run logs, and traces of chosen steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from megabridge.storage import metrics_file
from tests.support.models import TINY
from tests.support.rank_server import RankServer
from tests.support.recipe_runs import values

CASES = "tests.support.recipes"


def test_flops_of_a_token(ranks: RankServer) -> None:
    (counts,) = ranks.run("tests.support.throughput:counted")
    hidden, ffn, layers, vocabulary, heads, groups, width, length = 32, 48, 2, 61, 4, 2, 8, 16
    attention = hidden * (heads + 2 * groups) * width + heads * width * hidden
    dense = attention + 3 * hidden * ffn
    # Causal: scores and values over length / 2 positions, three times (forward, and two gradients).
    scores = layers * 3 * 2 * heads * 2 * width * length / 2
    assert counts["dense"] == pytest.approx(6 * (layers * dense + hidden * vocabulary) + scores)
    # Tied or not: the embedding is looked up, the output layer is a product.
    assert counts["untied"] == counts["dense"]
    frozen = layers * 3 * hidden * ffn
    assert counts["dense"] - counts["frozen_mlp"] == 2 * frozen
    # Two of four experts, and the router's scores of all four.
    mixture = attention + 2 * 3 * hidden * ffn + hidden * 4
    assert counts["experts"] == pytest.approx(6 * (layers * mixture + hidden * vocabulary) + scores)
    # A window of 4 in a sequence of 16: positions seen on average, 4 - 4 * 4 / 32.
    assert counts["dense"] - counts["windows"] == pytest.approx(layers * 3 * 2 * heads * 2 * width * (8 - 3.5))


def test_peaks(ranks: RankServer) -> None:
    (found,) = ranks.run("tests.support.throughput:peaks")
    assert found == [989e12, 756e12, 312e12, 121e12, None, None]


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2)], ids=str)
def test_what_a_run_logs(ranks: RankServer, tmp_path: Path, topology: Topology) -> None:
    config = values(tmp_path, None, topology, model={"hf": {**TINY, "vocab_size": 61}, "load_weights": False}, recipe={"steps": 4})
    config["callbacks"] = {"profile": {"_target_": "megabridge.callbacks.profile.Profile", "first": 2, "steps": 2}}
    config["checkpoint"] = {"save_at_end": False}
    ranks.run(f"{CASES}:recipe", topology=topology, kwargs={"name": "pretrain", "values": config})
    rows = list(metrics_file.read(tmp_path))
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 4
    for row in steps:
        assert row["train/tokens_per_second"] * row["train/step_seconds"] == pytest.approx(4 * 16)
        assert row["train/tflops_per_device"] > 0 and row["train/grad_norm"] > 0 and row["train/learning_rate"] == 1e-2
        assert 0.05 < row["train/memory_gib"] < 50
        assert "train/mfu" not in row and "train/skipped_steps" not in row
    work = {topology.world_size * row["train/tflops_per_device"] / row["train/tokens_per_second"] for row in steps}
    assert max(work) == pytest.approx(min(work))
    validations = [row for row in rows if "validation/loss" in row]
    assert all(row["validation/perplexity"] == pytest.approx(math.exp(row["validation/loss"])) for row in validations)

    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_2-3_rank_0.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("aten::mm" in str(name) for name in names)
