"""Plans without running, in one process, from the config alone.

recipe=plan parallel=tp8pp2 looks at one layout: proves that the ranks' boxes tile every Hugging Face tensor exactly once, and
reports what each rank holds, reads and writes, and how much memory training with the config's recipe is expected to need.
recipe=plan plan.gpus=64 plan.device=h100 first ranks the layouts of so many devices, and then looks at the best.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config import schema
from megabridge.config.schema import Config
from megabridge.layouts import commands
from megabridge.layouts.memory import ExpectedMemory
from megabridge.layouts.search import Candidate
from megabridge.loggers import Reporter
from megabridge.planning import memory
from megabridge.planning.all_ranks import AllRanksPlan, RankCost, plan_all_ranks
from megabridge.planning.layout_search import Ranked, ranked
from megabridge.planning.storage_time import StorageTime, storage_times
from megabridge.training import build
from megabridge.training.throughput import GIB

WIDTH: Final = 108
"""Columns of what is printed; a console's line has 12 more for the time."""
_KEPT: Final = 10
"""Times as many layouts as are shown stand in plan.json."""


def main(config: Config) -> float | None:
    """One process calls it, without process groups. Writes plan.json to the run directory.

    Returns the expected seconds of a step where it chose the layout.
    """
    config.model.load_weights = False
    hf = config.model.hf
    bridge = (
        AutoBridge.from_hf_config(hf, dtype=config.model.dtype, ignore_keys=config.model.ignore_keys)
        if hf
        else build.bridge(config)
    )
    with Reporter(config, build.loggers(config)) as report:
        best, said, per_host = None, {}, config.plan.figures.per_host or _HOST
        if config.parallel.auto or config.plan.gpus is not None:
            found = ranked(config, bridge)
            best, said = found.layouts[0], _choice(found, config, report)
            per_host = found.found.machine.device.per_host
            config = best.layout.config(config)
        said |= _one_layout(config, bridge, report, per_host)
        file = Path(config.run_dir) / "plan.json"
        file.write_text(json.dumps(said, indent=2) + "\n")
        report.say(f"every rank: {file}")
        return None if best is None else best.time.total


def _choice(found: Ranked, config: Config, report: Reporter) -> dict[str, Any]:
    """Shows the best layouts and logs the first; returns what plan.json says of them."""
    for line in [*layout_table(found, config), *layout_commands(found, config)]:
        report.say(line)
    best = found.layouts[0]
    report.log(
        0,
        {
            "plan/step_seconds": best.time.total,
            "plan/tokens_per_second": best.tokens_per_second,
            "plan/mfu": best.mfu,
            "plan/memory_gib": best.gib,
            "plan/bubble": best.bubble,
        },
    )
    machine = found.found.machine
    shown = found.layouts[: _KEPT * config.plan.show]
    return {
        "chosen": str(best.layout),
        "devices": {"count": machine.count, **asdict(machine.device)},
        "fitting": len(found.layouts),
        "too_large": found.found.too_large,
        "layouts": [
            {**one.content(), "is_traced": number < found.traced, "command": _command(one, found, config)}
            for number, one in enumerate(shown)
        ],
    }


def _one_layout(config: Config, bridge: AutoBridge, report: Reporter, per_host: int) -> dict[str, object]:
    """Shows what the ranks of the config's layout hold, move and need; returns what plan.json says of it."""
    provider = build.provider(config, bridge)
    report.say(provider.describe())
    begin = time.perf_counter()
    topology = schema.topology(config.parallel)
    plan = plan_all_ranks(bridge.source.family, bridge.source.native, provider, topology)
    costs = plan.costs(config.conversion.max_shard_size)
    report.say(
        f"{len(plan.tensors)} tensors, {plan.bytes / 1e6:.1f} MB: each element is written by exactly one of "
        f"{plan.topology.world_size} ranks, proven in {time.perf_counter() - begin:.1f} s"
    )
    for line in table(plan, costs):
        report.say(line)
    times = storage_times(config.plan, topology, costs, per_host=per_host)
    for line in storage_lines(times, config, per_host):
        report.say(line)
    expected = memory.expected_memory(config, bridge, provider)
    for line in memory_table(expected, config):
        report.say(line)
    return content(plan, costs, expected) | {"import": asdict(times[0]), "export": asdict(times[1])}


_HOST: Final = 8
"""Ranks of a host where nothing says how many."""


def layout_table(found: Ranked, config: Config) -> list[str]:
    """Returns a header and a line per shown layout."""
    machine, fits = found.found.machine, len(found.layouts)
    lines = [
        f"{fits + found.found.too_large} layouts of {machine.count} x {machine.device.name}: {fits} fit, ranked in "
        f"{found.seconds:.1f} s by the step time that is expected (docs/scale.md);",
        f"memory is traced of {found.traced} and estimated (~) of others; bubble, waiting by axis and update are % of a step",
    ]
    columns = ("rank", "layout", "GiB", "step s", "tokens/s", "MFU", "bubble", "tp", "ep", "cp", "pp", "dp", "update")
    widths = (4, 26, 6, 8, 10, 5, 6, 5, 5, 5, 5, 5, 6)
    lines.append(_line(columns, widths))
    for rank, one in enumerate(shown(found, config), 1):
        waits = (one.time.bubble, one.time.tensor, one.time.expert, one.time.context, one.time.pipeline, one.time.data)
        shares = [f"{100 * wait / one.time.total:.1f}" for wait in (*waits, one.time.optimizer)]
        is_traced = one in found.layouts[: found.traced]
        cells = (
            str(rank),
            str(one.layout),
            f"{'' if is_traced else '~'}{one.gib:.1f}",
            f"{one.time.total:.4g}",
            f"{one.tokens_per_second:.0f}",
            f"{one.mfu:.3f}",
            *shares,
        )
        lines.append(_line(cells, widths))
    return lines


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " ".join(
        f"{cell:<{width}}" if place == 1 else f"{cell:>{width}}"
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def shown(found: Ranked, config: Config) -> list[Candidate]:
    """Returns `plan.show` layouts, best first; of those that differ in nothing but vpp the best."""
    best: dict[object, Candidate] = {}
    for one in found.layouts:
        sizes = {**one.layout.topology.sizes(), "vpp": 1}
        best.setdefault((*sizes.values(), one.layout.sequence_parallel), one)
    return list(best.values())[: config.plan.show]


def layout_commands(found: Ranked, config: Config) -> list[str]:
    """Returns the command of each shown layout, by its rank: a text each, of lines that a shell reads as one."""
    texts = ["run one by its rank with:"]
    for rank, one in enumerate(shown(found, config), 1):
        wrapped = commands.wrapped(_command(one, found, config), width=WIDTH - 5)
        texts.append(f"{rank:>3}  " + "\n".join(wrapped))
    return texts


def _command(one: Candidate, found: Ranked, config: Config) -> str:
    given = [text for text in config.plan.arguments if not text.lstrip("+").startswith("parallel.")]
    machine = found.found.machine
    return commands.start(machine.count, [*given, *one.layout.overrides], per_host=machine.device.per_host)


def storage_lines(times: tuple[StorageTime, StorageTime], config: Config, per_host: int) -> list[str]:
    """Returns lines on the time that storage takes for an import and an export."""
    limit = config.plan.storage_total_gbs
    said = f"{config.plan.storage_gbs:g} GB/s a host of {per_host}{'' if limit is None else f', {limit:g} GB/s in all'}"
    lines = [f"with storage of {said}:"]
    for name, one in zip(("import reads", "export writes"), times, strict=True):
        lines.append(
            f"  {name} {one.total / 1e9:.1f} GB, at most {one.most_of_a_rank / 1e9:.3f} GB of a rank and "
            f"{one.most_of_a_host / 1e9:.3f} GB of a host, in {one.seconds:.2f} s"
        )
    return lines


def table(plan: AllRanksPlan, costs: dict[int, RankCost]) -> list[str]:
    """Returns a line per pipeline stage: the range over its ranks that write. Replicas hold the same and write nothing."""
    columns = ("stage", "holds MB", "reads MB", "in pieces", "writes MB", "into files", "staging MB")
    lines = [" ".join(f"{column:>14}" for column in columns)]
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
        lines.append(" ".join(f"{cell:>14}" for cell in cells))
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
