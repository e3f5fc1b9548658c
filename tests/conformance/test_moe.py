"""The conformance checks on a family with experts, over its layouts, and a comparison that names a broken router."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.checked import check, findings
from tests.support.rank_server import RankServer

MIXTRAL = "megabridge.families.mixtral:FAMILY"


@pytest.mark.grid
def test_every_layout_with_experts_passes(ranks: RankServer, tmp_path: Path) -> None:
    check(ranks, tmp_path, Topology(tp=2), MIXTRAL)
    found = findings(tmp_path)
    layouts = {"dp2", "ep2dp2", "tp2sp", "tp2ep2etp1sp", "pp2"}
    assert layouts <= found.keys()
    assert not [problem for entry in found.values() for problems in entry.values() for problem in problems]
    assert all("gradients" in found[layout] for layout in layouts)
