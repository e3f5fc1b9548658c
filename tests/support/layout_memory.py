"""What tests/planning/test_layout_search.py has traced, in one process."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.layouts import memory
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.layouts.work import work_of
from megabridge.parallel.topology import Topology
from megabridge.planning.memory import expected_memory
from megabridge.training import build
from tests.support import layouts

LAYERS = 4


def both(cases: list[dict[str, Any]], recipe: dict[str, Any]) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """(estimated, traced) memory by stage of each case."""
    found = []
    for case in cases:
        settings = dict(case["settings"])
        dtype = settings.pop("dtype", None)
        run = layouts.config(case["model"], hf={"num_hidden_layers": LAYERS, "layer_types": None}, recipe=recipe, **settings)
        run.model.load_weights = False
        if dtype is not None:
            run = replace(run, model=replace(run.model, dtype=dtype))
        sizes = dict(case["parallel"])
        is_cut = sizes.pop("sequence_parallel", False)
        layout = ParallelLayout(Topology(**sizes), is_cut)
        placed = layout.config(run)
        bridge = AutoBridge.from_hf_config(run.model.hf, dtype=run.model.dtype)
        work = work_of(placed, bridge.source.native)
        stages = work.dealt(layout.topology).heaviest
        estimated = {stage: asdict(one) for stage, one in memory.expected(work, layout).items()}
        exact = expected_memory(placed, bridge, build.provider(placed, bridge), stages)
        found.append((estimated, {stage: asdict(one) for stage, one in zip(stages, exact, strict=True)}))
    return found
