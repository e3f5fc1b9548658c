"""Published mixtures of experts under layouts of many ranks: every element of every tensor has one writer, in one process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer

# Of the model cards: billions of parameters, without the layers that predict further tokens. Layouts: experts over all ranks of a
# stage, or some; experts cut like the dense matrices; stages of unequal numbers of layers.
PLANS = [
    ("gpt_oss_120b", 116.8, Topology(tp=8, pp=4, ep=8, etp=1)),
    ("deepseek_v3", 671.0, Topology(tp=8, pp=16, ep=64, etp=1, dp=16)),
    ("deepseek_v3", 671.0, Topology(pp=16, ep=32, dp=32)),
    ("deepseek_v3", 671.0, Topology(tp=2, pp=8, ep=8, dp=8)),
    ("qwen3_235b_a22b", 235.1, Topology(tp=4, pp=8, ep=32, etp=1, dp=16)),
    ("qwen3_235b_a22b", 235.1, Topology(tp=2, pp=4, ep=16, dp=16)),
    ("glm45", 352.8, Topology(tp=8, pp=8, ep=32, etp=1, dp=8)),
]


@pytest.mark.parametrize(("model", "billions", "layout"), PLANS, ids=[f"{model}-{layout}" for model, _, layout in PLANS])
def test_a_published_mixture_is_planned(ranks: RankServer, model: str, billions: float, layout: Topology) -> None:
    if layout != PLANS[0][2] and "MEGABRIDGE_PLANS" not in os.environ:
        pytest.skip("make test-plans; minutes on a loaded machine")
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "ep", "dp")}
    parallel = [f"parallel.{name}={size}" for name, size in sizes.items()]
    parallel += [f"parallel.etp={layout.expert_tp}", f"parallel.sequence_parallel={layout.tp > 1}"]
    kwargs = {"model": model, "parallel": parallel}
    (seen,) = ranks.run("tests.support.world:published", world_size=1, kwargs=kwargs, timeout=600)
    assert seen["ranks"] == layout.world_size
    assert seen["parameters"] / 1e9 == pytest.approx(billions, rel=2e-3)
    assert seen["written"] == seen["bytes"], "every element once"
    assert len(seen["layers"]) == layout.pp and max(seen["layers"]) - min(seen["layers"]) <= 2, "stages are about even"
    assert seen["held"] < 8 * seen["bytes"] / layout.world_size * layout.dp
    print(f"{model} {layout}: {seen['tensors']} tensors in {seen['seconds']:.1f} s of CPU time")


# Models, devices and batches as they were published: billions of parameters, and a layout that must be among those that are found.
AT_SCALE = [
    ("qwen3_30b_a3b", 64, "recipe.seq_length=4096 recipe.global_batch_size=256", 30.5),
    ("deepseek_v3", 2048, "recipe.seq_length=4096 recipe.global_batch_size=15360", 671.0),
    ("llama31_405b", 16384, "recipe.seq_length=8192 recipe.global_batch_size=2048", 405.9),
]


@pytest.mark.parametrize(("model", "count", "batch", "billions"), AT_SCALE, ids=[f"{row[0]}-{row[1]}" for row in AT_SCALE])
def test_a_layout_is_found_for_many_devices(
    ranks: RankServer, tmp_path: Path, model: str, count: int, batch: str, billions: float
) -> None:
    if count > 64 and "MEGABRIDGE_PLANS" not in os.environ:
        pytest.skip("make test-plans; minutes on a loaded machine")
    begin = time.perf_counter()
    command = f"recipe=plan model={model} {batch} plan.gpus={count} plan.device=h100 logger=local run_dir=run"
    done = ranks.program(command, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["world_size"] == count and plan["bytes"] / 2e9 == pytest.approx(billions, rel=2e-3)
    assert plan["fitting"] > 20 and 0.1 < plan["layouts"][0]["mfu"] < 0.6
    assert plan["export"]["total"] == plan["bytes"] <= plan["import"]["total"]
    print(f"{done.stdout}\n{model} on {count}: {time.perf_counter() - begin:.1f} s")
