"""SmolLM2-135M-Instruct, real weights: byte for byte through every layout that its 9 heads and 3 KV heads allow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.payload import payload
from tests.support.rank_server import RankServer


@pytest.fixture(scope="module")
def source() -> Path:
    from megabridge.hf import quickstart, resolve

    return resolve.resolve(quickstart.HUB_ID)


@pytest.fixture(scope="module")
def expected(ranks: RankServer, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "logits"
    ranks.run("tests.support.smollm2:reference", kwargs={"source": str(source), "out": str(path)}, threads_each=2)
    return path


@pytest.mark.parametrize(
    ("layout", "compares"),
    [(Topology(), True), (Topology(tp=3), True), (Topology(pp=2), False), (Topology(tp=3, pp=2), False)],
    ids=["single", "tp3", "pp2", "tp3pp2"],
)
def test_round_trip_and_logits(
    ranks: RankServer, source: Path, expected: Path, tmp_path: Path, layout: Topology, compares: bool
) -> None:
    out = tmp_path / "out"
    kwargs = {"source": str(source), "out": str(out), "expected": str(expected) if compares else None}
    distances = ranks.run("tests.support.smollm2:round_trip", topology=layout, kwargs=kwargs, timeout=300)
    assert payload(out) == payload(source)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json"))
    if compares:
        assert max(distances) < 1e-4
    shutil.rmtree(out)
