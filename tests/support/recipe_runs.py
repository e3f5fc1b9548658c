"""Recipes on a tiny model, from the process of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megabridge.parallel.topology import Topology
from megabridge.storage.metrics_file import read
from tests.support.rank_server import RankServer

CASES = "tests.support.recipes"


def values(run_dir: Path, source: Path | None, topology: Topology, **groups: Any) -> dict[str, Any]:
    model: dict[str, Any] = {"name": "tiny", "path": None if source is None else str(source)}
    return {
        "model": {**model, **groups.pop("model", {})},
        "parallel": {"tp": topology.tp, "pp": topology.pp, "vpp": topology.vpp},
        "recipe": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 16, **groups.pop("recipe", {})},
        "optimizer": {"lr": 1e-2},
        "scheduler": {"name": "constant"},
        "data": {"_target_": "tests.support.recipes.TinyData"},
        "callbacks": {
            "import_parity": {"_target_": "megabridge.callbacks.parity.ImportParity"},
            "hf_export": {"_target_": "megabridge.callbacks.hf_export.HFExport"},
            "progress": {"_target_": "megabridge.callbacks.progress.Progress"},
            "answer": {"_target_": "megabridge.callbacks.answer.Answer", "max_new_tokens": 4, "prompt": groups.pop("prompt", None)},
            "order": {"_target_": "tests.support.recipes.HookOrder"},
        },
        "logger": {
            "jsonl": {"_target_": "megabridge.loggers.jsonl.JsonLines"},
            "console": {"_target_": "megabridge.loggers.console.Console"},
            "wandb": None,
            "lines": {"_target_": "tests.support.loggers.Lines"},
        },
        "run_dir": str(run_dir),
        **groups,
    }


def run(ranks: RankServer, recipe: str, topology: Topology, config: dict[str, Any]) -> list[float | None]:
    return ranks.run(f"{CASES}:recipe", topology=topology, kwargs={"name": recipe, "values": config})


def metrics(run_dir: Path, prefix: str) -> list[dict[str, Any]]:
    return [row for row in read(run_dir) if any(name.startswith(prefix) for name in row)]
