"""The benchmark: its peers move the same elements as we do, it counts what it says, and it measures every layout that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabridge.parallel.topology import Topology
from tests.support.models import TINY
from tests.support.payload import payload
from tests.support.rank_server import RankServer

CASES = "tests.support.bench"
LAYOUT = Topology(tp=2, pp=2)


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with padded rows and one KV head for two ranks."""
    folder = tmp_path_factory.mktemp("bench") / "source"
    config = {**TINY, "tie_word_embeddings": True, "num_key_value_heads": 1}
    ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": config})
    return folder


def test_the_whole_tensor_pattern_moves_the_same_elements(ranks: RankServer, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    seen = ranks.run(f"{CASES}:whole_tensors", topology=LAYOUT, kwargs={"source": str(source), "out": str(out)})
    assert payload(out) == payload(source)
    for rank in seen:
        assert rank["mismatched"] == ()
        assert rank["read"] > 1.8 * rank["owned"], "every rank reads whole tensors"
        assert rank["imported"] == (0, rank["items"])  # one scatter or broadcast a parameter
        assert rank["exported"][0] > 2 * rank["items"], "metadata travels as objects, for every parameter"


def test_our_calls_do_not_grow_with_the_model(ranks: RankServer, tmp_path: Path) -> None:
    sources = []
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": {**TINY, "num_hidden_layers": layers}})
        sources.append(str(folder))
    for small, large in ranks.run(
        f"{CASES}:calls_of_ours", topology=LAYOUT, kwargs={"sources": sources, "out": str(tmp_path / "out")}
    ):
        assert small == large and small[0] > 0


def test_anonymous_memory_is_seen(ranks: RankServer) -> None:
    ((large, none),) = ranks.run(f"{CASES}:anonymous", world_size=1)
    assert 32 << 20 < large < 96 << 20 and none < 8 << 20


def test_each_layout_is_measured_and_told(ranks: RankServer, tmp_path: Path) -> None:
    """Real ranks measure; the conductor, played these results, starts the right ranks and prints what was found."""
    results: dict[str, dict[str, Any]] = {}
    for layout in (Topology(), Topology(tp=2)):
        ranks.run(f"{CASES}:measured", topology=layout, kwargs={"run_dir": str(tmp_path), "layout": str(layout)})
        results[str(layout)] = json.loads((tmp_path / str(layout) / "result.json").read_text())
        assert not (tmp_path / str(layout) / "out").exists()
    both = {"plan", "plain copy", "import", "import of whole tensors", "import verification", "plain write", "export",
            "export verification", "export of whole tensors", "stream"}  # fmt: skip
    assert both <= results["tp2"]["seconds"].keys()
    assert results["single"]["seconds"].keys() - results["tp2"]["seconds"].keys() == {"from_pretrained", "save_pretrained"}
    read = results["tp2"]["bytes_read_per_rank"]
    assert read["import"] == read["owned"] < read["import of whole tensors"] == results["tp2"]["bytes"]
    assert all(
        calls["objects"] < results["tp2"]["tensors"] / 4
        for name, calls in results["tp2"]["collectives"].items()
        if "whole" not in name
    )

    (started,) = ranks.run(
        f"{CASES}:conduct", world_size=1, kwargs={"run_dir": str(tmp_path / "run"), "results": {**results, "tp3": {}}}
    )
    assert [(run["values"]["parallel"]["tp"], run["world_size"]) for run in started] == [(1, 1), (2, 2)]
    for run in started:
        assert run["values"]["recipe"]["target"] == "recipes.bench_ranks:main" and not run["values"]["recipe"]["single_process"]
        assert run["configs"]["source"]["num_hidden_layers"] == run["configs"]["narrow"]["num_hidden_layers"] == 5
    written = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert written["layouts"] == results and written["host"]["device"] == "cpu"
    lines = (tmp_path / "run" / "lines.txt").read_text()
    for text in (
        "single: 67 tensors",
        "import is ",
        " x plain copy (at least 0.9 wanted)",
        " x save_pretrained",
        "CPU time per tensor: plan ",
        "tp3: left out: parallel.tp=3 must divide num_attention_heads=8",
    ):
        assert text in lines, text
    assert not (tmp_path / "run" / "source").exists()
