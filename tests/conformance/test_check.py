"""The checks as a program: one run over every layout of its ranks, everything that fails listed, and the real model's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.checked import check, findings
from tests.support.models import TINY
from tests.support.rank_server import RankError, RankServer

LLAMA = "megabridge.families.llama:FAMILY"
LAYOUTS = ["dp4", "tp2dp2", "tp2dp2sp", "tp4", "tp4sp", "pp2dp2", "tp2pp2", "pp2vpp2dp2", "tp2pp2vpp2", "pp4"]


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "source"
    ranks.run("tests.support.recipes:make_source", kwargs={"folder": str(folder)})
    return folder


@pytest.mark.grid
def test_every_layout_of_four_ranks_and_the_models_own_files(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    check(ranks, tmp_path, Topology(tp=2, pp=2), None, path=str(source))
    found = findings(tmp_path)
    assert [where for where in found if where in LAYOUTS] == LAYOUTS
    assert all(found[layout].keys() == {"bijection", "bytes", "logits", "gradients"} for layout in LAYOUTS)
    model = [where for where in found if where.startswith("model")]
    assert {f"model, {layout}" for layout in ("dp4", "tp4", "tp2pp2")} < set(model), "3 layers: vpp2 over pp4 is not among them"
    assert found["model, tp4"].keys() == {"headers", "bytes", "logits"}, "weights under the first layout without copies"
    assert not [problems for checks in found.values() for problems in checks.values() if problems]
    assert not list((tmp_path / "check").glob("*/model.safetensors.partial")) and not (tmp_path / "check/exported").exists()
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    assert any(line.split()[:2] == ["tp2pp2", "-"] for line in lines), "the table has a row per layout"


def test_all_that_fails_is_listed(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        check(ranks, tmp_path / "wrong", Topology(dp=2), "tests.support.conformance:WRONG")
    text = str(caught.value)
    for line in (
        "tiny config, config: layernorm_epsilon=1e-05 comes back as 5e-06",
        "dp2, logits: differ",
        "dp2, gradients: ",
        "tp2, logits: differ",
    ):
        assert line in text, line
    with pytest.raises(RankError, match=r"tiny model, reference: transformers can't build") as caught:
        check(ranks, tmp_path / "unknown", Topology(), "tests.support.conformance:UNKNOWN")
    with pytest.raises(RankError) as caught:
        check(ranks, tmp_path / "missing", Topology(), "tests.support.conformance:MISSING")
    assert "no rule of LlamaForCausalLM feeds the parameter decoder.layers.0.mlp.linear_fc1.weight" in str(caught.value)


def test_a_model_whose_files_do_not_fit_its_family(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    config = {**TINY, "vocab_size": 62, "num_hidden_layers": 3, "attention_multiplier": 2.0}
    for number, problem in enumerate(
        ("model, config: .*attention_multiplier=2.0", "model, single, headers: .*wrong shape: model.embed")
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(RankError, match=f"(?s){problem}"):
            check(ranks, tmp_path / str(number), Topology(), None, path=str(folder))
        config.pop("attention_multiplier", None)
