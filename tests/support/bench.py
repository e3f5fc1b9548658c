"""What ranks do in the tests of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.config import schema
from megabridge.conversion.compare import compare, to_native
from megabridge.conversion.shards import plan_shards
from megabridge.hf.tensor_files import find_tensors
from megabridge.launchers import local
from megabridge.parallel import process_groups
from megabridge.platform.patches.counted_collectives import counted
from recipes import bench, bench_peers, bench_ranks
from tests.support.convert import provide
from tests.support.models import TINY


def whole_tensors(source: str, out: str) -> dict[str, Any]:
    """The peers' pattern there and back: what differs after the import, bytes read, calls."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, load_weights=False)
    plan, infos = bridge.plan(model), find_tensors(Path(source))
    topology = process_groups.current()
    assert topology is not None
    own = bench_peers.Groups(topology)
    with torch.no_grad():
        for item in plan.items:
            item.local.data.fill_(3)
    with counted() as imported:
        read = bench_peers.import_whole(plan, infos, own)
    found = compare(plan, infos, to_native)
    with counted() as exported:
        bench_peers.export_whole(plan, plan_shards(Path(out), plan.tensors), own)
    return {
        "mismatched": found.mismatched,
        "read": read,
        "owned": plan.owned_bytes,
        "imported": (imported.objects, imported.tensors),
        "exported": (exported.objects, exported.tensors),
        "items": len(plan.items),
    }


def calls_of_ours(sources: list[str], out: str) -> list[tuple[int, int]]:
    """Collectives, of objects and of tensors, of an import and an export of each source after planning."""
    seen = []
    for number, source in enumerate(sources):
        bridge = AutoBridge.from_hf_pretrained(source)
        model = provide(bridge, load_weights=False)
        bridge.plan(model)
        with counted() as calls:
            bridge.load_hf_weights(model, show_progress=False)
            bridge.save_hf_pretrained(model, f"{out}/{number}", show_progress=False)
        seen.append((calls.objects, calls.tensors))
    return seen


def anonymous() -> tuple[int, int]:
    """What is seen of 64 MiB that are touched, and of none."""
    with bench_ranks.anonymous_peak() as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        torch.empty(1).sum()
        while peak() < held.nbytes // 2:
            pass
    large = peak()
    del held
    with bench_ranks.anonymous_peak() as peak:
        pass
    return large, peak()


def conduct(run_dir: str, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """recipes.bench:main where the ranks of each layout are played by `results`; what it would have started."""
    started = []

    def launch(values: dict[str, Any], *, world_size: int, platform: str) -> None:
        json.dumps(values)
        schema.typed(values)
        configs = {
            name: json.loads((Path(folder) / "config.json").read_text()) for name, folder in values["recipe"]["options"].items()
        }
        started.append({"values": values, "world_size": world_size, "platform": platform, "configs": configs})
        folder = Path(values["run_dir"])
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(results[folder.name]))

    local.launch = launch  # type: ignore[assignment]
    values = {
        "model": {"name": "tiny", "hf": {**TINY, "num_hidden_layers": 5}},
        "bench": {"layouts": list(results), "repeats": 1},
        "recipe": {"target": "recipes.bench:main", "steps": 0, "single_process": True},
        "logger": {"lines": {"_target_": "tests.support.loggers.Lines"}},
        "run_dir": run_dir,
    }
    bench.main(schema.typed(values))
    return started


def measured(run_dir: str, layout: str) -> None:
    """recipes.bench_ranks:main on a tiny model, as the conductor would start it."""
    root = Path(run_dir)
    values = {
        "model": {"name": "tiny", "dtype": "bfloat16", "hf": TINY},
        "parallel": {"tp": 2} if layout == "tp2" else {},
        "bench": {"repeats": 2},
        "recipe": {"steps": 0, "options": {"source": str(root / "source"), "narrow": str(root / "narrow")}},
        "run_dir": str(root / layout),
    }
    if torch.distributed.get_rank() == 0 and not (root / "source").exists():
        for name in ("source", "narrow"):
            (root / name).mkdir()
            (root / name / "config.json").write_text(json.dumps({**TINY, "dtype": "bfloat16"}))
    torch.distributed.barrier()
    bench_ranks.main(schema.typed(values))
