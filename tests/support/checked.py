"""`recipe=check` on a tiny family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer


def check(ranks: RankServer, run_dir: Path, topology: Topology, family: str | None, **model: Any) -> None:
    values = {
        "model": {"name": "auto", "path": None, **model},
        "parallel": {"tp": topology.tp, "pp": topology.pp, "dp": topology.dp},
        "recipe": {"steps": 0},
        "family": family,
        "logger": {"lines": {"_target_": "tests.support.loggers.Lines"}},
        "run_dir": str(run_dir),
    }
    ranks.run("tests.support.recipes:recipe", topology=topology, kwargs={"name": "check", "values": values}, timeout=300)


def findings(run_dir: Path) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for entry in json.loads((run_dir / "check/findings.json").read_text()):
        found.setdefault(entry["where"], {})[entry["what"]] = entry["problems"]
    return found
