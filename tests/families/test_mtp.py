"""Multi-token prediction: imported, trained and exported when asked for, carried along when not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.payload import payload
from tests.support.rank_server import RankServer

LAYOUTS = {
    "single": Topology(),
    "tp2": Topology(tp=2),
    "pp2": Topology(pp=2),
    "pp2vpp2": Topology(pp=2, vpp=2),
    "pp2ep2": Topology(pp=2, ep=2, dp=2),
}


@pytest.fixture(scope="module", params=["DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"])
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("mtp") / "source"
    ranks.run("tests.support.mtp:make", kwargs={"folder": str(root), "architecture": request.param}, timeout=300)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_built_it_is_what_transformers_has(layout: str, source: Path, ranks: RankServer, tmp_path: Path) -> None:
    kwargs = {"source": str(source), "out": str(tmp_path / "out")}
    for problems in ranks.run("tests.support.mtp:built", topology=LAYOUTS[layout], kwargs=kwargs, timeout=300):
        assert problems == []
    assert payload(tmp_path / "out") == payload(source)


def test_its_own_embedding_must_equal_the_models(source: Path, ranks: RankServer, tmp_path: Path) -> None:
    kwargs = {"source": str(source), "folder": str(tmp_path / "damaged")}
    (said,) = ranks.run("tests.support.mtp:unequal", topology=Topology(), kwargs=kwargs, timeout=300)
    assert said.startswith("CheckpointError: copies of a tensor in files") and "mtp_num_layers to 0" in said
    assert "model.layers.5.embed_tokens.weight differs from model.embed_tokens.weight" in said
    assert "shared_head.head" not in said


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_carried_along_where_it_is_not_built(layout: str, source: Path, ranks: RankServer, tmp_path: Path) -> None:
    kwargs = {"source": str(source), "out": str(tmp_path)}
    for problems in ranks.run("tests.support.mtp:not_built", topology=LAYOUTS[layout], kwargs=kwargs, timeout=300):
        assert problems == []
    for name in ("straight", "after"):
        assert payload(tmp_path / name) == payload(source)


@pytest.mark.parametrize(
    ("architecture", "key", "tensor"),
    [
        ("Glm4MoeLiteForCausalLM", "num_nextn_predict_layers", "model.layers.5.eh_proj.weight"),
        ("Ernie4_5_MoeForCausalLM", "num_nextn_predict_layers", "model.mtp_linear_proj.0.weight"),
        ("ExaoneMoeForCausalLM", "num_nextn_predict_layers", "mtp.fc.weight"),
        ("MiniMaxM2ForCausalLM", "num_mtp_modules", "model.layers.5.eh_proj.weight"),
    ],
)
def test_carried_along_under_other_names(architecture: str, key: str, tensor: str, ranks: RankServer, tmp_path: Path) -> None:
    kwargs = {"folder": str(tmp_path / "source"), "architecture": architecture, "key": key, "tensor": tensor}
    ranks.run("tests.support.mtp:make_with", kwargs=kwargs, timeout=300)
    kwargs = {"source": str(tmp_path / "source"), "out": str(tmp_path)}
    assert ranks.run("tests.support.mtp:not_built", topology=Topology(), kwargs=kwargs, timeout=300) == [[]]
    assert tensor in payload(tmp_path / "after")
