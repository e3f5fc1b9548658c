"""An export needs nothing of the folder that a bridge was made from, whatever becomes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.fake_hub import COMMIT, serving
from tests.support.gone import LOSSES
from tests.support.payload import payload
from tests.support.rank_server import RankServer
from tests.support.recipe_runs import metrics, run, values

CASES = "tests.support.gone"
ASSETS = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "source"
    ranks.run("tests.support.native_models:make_source", kwargs={"folder": str(folder)})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ASSETS}


def test_exports_have_what_was_there_when_the_bridge_was_made(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    kwargs = {"source": str(source), "out": str(tmp_path)}
    for said in ranks.run(f"{CASES}:exports", topology=Topology(tp=2), kwargs=kwargs):
        for name in LOSSES:
            for folder in ("hf", "again", "merged", "native/assets", "native_adapter/assets"):
                assert files(tmp_path / name / folder) == files(source), f"{name}: {folder}"
                assert not (tmp_path / name / folder / "special_tokens_map.json").exists(), f"{name}: {folder}"
            assert payload(tmp_path / name / "again") == payload(source), name
            assert sorted(path.name for path in (tmp_path / name / "adapter").iterdir())[:2] == [
                "adapter_config.json",
                "adapter_model.safetensors",
            ]
            expected = "must hold the model that was there when the bridge was made" if name == "replaced" else "must"
            assert said[name]["import"].startswith("CheckpointError: ") and expected in said[name]["import"], said[name]


def test_a_push_and_a_process_that_is_not_the_first(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    for name in ("model", "other"):
        shutil.copytree(source, tmp_path / name)
    models: dict[str, dict[str, bytes]] = {}
    with serving(models) as (address, _):
        kwargs = {"source": str(tmp_path / "model"), "endpoint": address, "cache": str(tmp_path / "cache")}
        (url,) = ranks.run(f"{CASES}:pushed", world_size=1, kwargs=kwargs)
    assert url == f"{address}/me/model/commit/{COMMIT}"
    assert {name: models["me/model"][name] for name in ASSETS} == files(source)
    kwargs = {"source": str(tmp_path / "other"), "out": str(tmp_path / "out")}
    (seen,) = ranks.run(f"{CASES}:other_rank", world_size=1, kwargs=kwargs)
    assert seen["holds"] is None and seen["first holds"] == [name for name in ASSETS if name != "config.json"]
    assert seen["written"] == ASSETS
    assert "config.json is another; make a new bridge" in seen["replaced"]


def test_a_run_ends_as_if_its_source_were_there(ranks: RankServer, tmp_path: Path) -> None:
    source = tmp_path / "source"
    ranks.run("tests.support.recipes:make_source", kwargs={"folder": str(source), "tokenizer": True})
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".safetensors"}
    config = values(tmp_path / "run", source, Topology(dp=2), prompt="HELLO", recipe={"steps": 2}, checkpoint={"save_every": 1})
    config["callbacks"] |= {"loses": {"_target_": f"{CASES}.Loses"}}
    run(ranks, "finetune", Topology(dp=2), config)
    assert not source.exists() and metrics(tmp_path / "run", "parity/")
    for step in (1, 2):
        for folder in ("hf", "native/assets"):
            place = tmp_path / f"run/checkpoints/step_{step}" / folder
            assert all((place / name).read_bytes() == content for name, content in before.items() if name != "config.json"), place
    lines = (tmp_path / "run/lines.txt").read_text()
    assert "source model: (not asked: " in lines and "exported model: " in lines


def test_tensors_that_no_parameter_holds(ranks: RankServer, tmp_path: Path) -> None:
    architecture, source = "Glm4MoeForCausalLM", tmp_path / "source"
    ranks.run("tests.support.mtp:make", kwargs={"folder": str(source), "architecture": architecture})
    kwargs = {"source": str(source), "out": str(tmp_path)}
    for said in ranks.run(f"{CASES}:passthrough", topology=Topology(pp=2), kwargs=kwargs):
        assert said["deleted"] == said["deleted, native"] == "nothing was raised"
        for name in ("replaced", "replaced, native"):
            assert "CheckpointError" in said[name] and "is in no parameter, so exports copy it from" in said[name]
        assert "CheckpointError" in said["a flipped bit"] and "has other bytes; use another step" in said["a flipped bit"]
    assert payload(tmp_path / "deleted/hf") == payload(source)
