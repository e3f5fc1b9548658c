"""Plans a layout without running it: recipe=plan parallel=tp8pp2, in one process, from the config alone.

Proves that the ranks' boxes tile every Hugging Face tensor exactly once, and reports what each rank holds, reads and writes, and
how much memory training with the config's recipe is expected to need.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config import schema
from megabridge.config.schema import Config
from megabridge.loggers import Reporter
from megabridge.planning import memory
from megabridge.planning.all_ranks import AllRanksPlan, RankCost, plan_all_ranks
from megabridge.planning.memory import ExpectedMemory
from megabridge.training import build
from megabridge.training.throughput import GIB


def main(config: Config) -> None:
    """One process calls it, without process groups. Writes plan.json to the run directory."""
    config.model.load_weights = False
    hf = config.model.hf
    bridge = (
        AutoBridge.from_hf_config(hf, dtype=config.model.dtype, ignore_keys=config.model.ignore_keys)
        if hf
        else build.bridge(config)
    )
    provider = build.provider(config, bridge)
    with Reporter(config, build.loggers(config)) as report:
        report.say(provider.describe())
        begin = time.perf_counter()
        plan = plan_all_ranks(bridge.source.family, bridge.source.native, provider, schema.topology(config.parallel))
        costs = plan.costs(config.conversion.max_shard_size)
        report.say(
            f"{len(plan.tensors)} tensors, {plan.bytes / 1e6:.1f} MB: each element is written by exactly one of "
            f"{plan.topology.world_size} ranks, proven in {time.perf_counter() - begin:.1f} s"
        )
        for line in table(plan, costs):
            report.say(line)
        expected = memory.expected_memory(config, bridge, provider)
        for line in memory_table(expected, config):
            report.say(line)
        file = Path(config.run_dir) / "plan.json"
        file.write_text(json.dumps(content(plan, costs, expected), indent=2) + "\n")
        report.say(f"every rank: {file}")


def table(plan: AllRanksPlan, costs: dict[int, RankCost]) -> list[str]:
    """Returns a line per pipeline stage: the range over its ranks that write. Replicas hold the same and write nothing."""
    columns = ("stage", "holds MB", "reads MB", "in pieces", "writes MB", "into files", "staging MB")
    lines = [" ".join(f"{column:>17}" for column in columns)]
    for pp in range(plan.topology.pp):
        stage = [cost for rank, cost in costs.items() if plan.topology.coordinate(rank).pp == pp]
        cells = (
            str(pp),
            _span(cost.held_bytes / 1e6 for cost in stage),
            _span(cost.fed_bytes / 1e6 for cost in stage),
            _span(cost.contiguous_runs for cost in stage),
            _span(cost.written_bytes / 1e6 for cost in stage),
            _span(cost.files for cost in stage),
            _span(cost.staging_bytes / 1e6 for cost in stage),
        )
        lines.append(" ".join(f"{cell:>17}" for cell in cells))
    return lines


def memory_table(expected: Sequence[ExpectedMemory], config: Config) -> list[str]:
    """Returns a line per pipeline stage: the memory that training is expected to need on each of its devices."""
    recipe = config.recipe
    columns = [each.name for each in fields(ExpectedMemory)] + ["total"]
    lines = [f"expected memory of a device in GiB, micro_batch_size {recipe.micro_batch_size}, seq_length {recipe.seq_length}"]
    lines.append(" ".join(f"{column:>12}" for column in ("stage", *columns)))
    for stage, one in enumerate(expected):
        cells = (str(stage), *(f"{getattr(one, column) / GIB:.2f}" for column in columns))
        lines.append(" ".join(f"{cell:>12}" for cell in cells))
    return lines


def _span(values: Iterable[float]) -> str:
    found = list(values)
    low, high = (f"{value:.0f}" if isinstance(value, int) else f"{value:.1f}" for value in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


def content(plan: AllRanksPlan, costs: dict[int, RankCost], expected: Sequence[ExpectedMemory]) -> dict[str, object]:
    """Returns the content of plan.json: sizes in bytes, and costs by rank for the ranks that write."""
    return {
        "parallel": str(plan.topology),
        "world_size": plan.topology.world_size,
        "tensors": len(plan.tensors),
        "bytes": plan.bytes,
        "memory": [asdict(one) for one in expected],
        "ranks": {str(rank): asdict(cost) for rank, cost in costs.items()},
    }
