"""Native checkpoints by AutoBridge: one call each way, in one process or many, and what a checkpoint keeps of its source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megabridge.parallel.topology import Topology
from tests.support.fake_hub import COMMIT, serving
from tests.support.payload import payload
from tests.support.rank_server import RankServer
from tests.support.recipe_runs import metrics, values

CASES = "tests.support.native_models"
ASSETS = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def made(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "source"
    ranks.run(f"{CASES}:make_source", kwargs={"folder": str(folder)})
    return folder


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "source"))


def run(ranks: RankServer, case: str, source: Path, out: Path, **how: Any) -> list[Any]:
    return ranks.run(f"{CASES}:{case}", kwargs={"source": str(source), "out": str(out)}, **how)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ASSETS}


def test_there_and_back_in_one_process_with_the_source_gone(ranks: RankServer, made: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (seen,) = run(ranks, "one_process", source, out, world_size=1)
    assert seen["imported"] == seen["exported"] == ()
    assert seen["groups"] and seen["groups again"], "a call leaves no process group behind"
    assert seen["left"] == ["kept", "native", "out"], "no file of parameters stays"
    assert seen["assets"] == sorted([*ASSETS, "megabridge_source.json"])
    whole = payload(made)
    assert {"torch.float32", "torch.bfloat16"} == {dtype for dtype, _, _ in whole.values()} and "lm_head.weight" in whole
    for folder in ("out", "loaded"):
        assert payload(out / folder) == whole and files(out / folder) == files(made)
    assert {dtype for dtype, _, _ in payload(out / "float").values()} == {"torch.float32"}
    assert len([*(out / "float").glob("model-*.safetensors")]) > 1
    assert seen["dtypes"] == ["torch.float32", "torch.bfloat16"]
    for name, part in REFUSALS.items():
        assert part in seen["refusals"][name], f"{name}: {seen['refusals'][name]}"


REFUSALS = {
    "taken": "CheckpointError: ",
    "nothing there": "must be a complete native checkpoint",
    "no config": "has no config; give hf_model_id",
    "other config": "layernorm_epsilon=1e-05, here 0.001",
    "other source": "layernorm_epsilon=1e-05, here 0.001",
    "other hf_path": "layernorm_epsilon=1e-05, here 0.001",
    "damaged assets": "assets/megabridge_source.json has other bytes than were written",
    "damaged record": "megabridge_source.json must be what this version of megabridge writes",
    "twice": "ConfigError: a size must be given once, not as tp and tensor_model_parallel_size",
    "unknown": "has no setting 'tensor_parallel'",
    "processes": "torchrun --nproc-per-node=2",
}


def test_an_import_that_was_not_strict_is_told_at_the_export(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    (said,) = run(ranks, "not_strict", source, tmp_path / "out", world_size=1)
    assert "missing: model.norm.weight" in said["import"] and "unexpected: model.extra.weight" in said["import"]
    for place in ("export", "export_ckpt"):
        assert "MappingError" in said[place] and "pass strict=False" in said[place]
        assert "model.norm.weight" in said[place] and "model.extra.weight" in said[place]
    assert not said["published"] and said["folders"] == ["allowed", "loose", "native"]


def test_one_call_in_many_processes(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    first, second = run(ranks, "in_ranks", source, tmp_path / "out", world_size=2)
    assert payload(tmp_path / "out" / "pp2") == payload(source) and files(tmp_path / "out" / "pp2") == files(source)
    assert "must not exist, or be an empty folder" in first[0] and "must not exist, or be an empty folder" in second[0]


@pytest.mark.parametrize("topology", [Topology(tp=2, pp=2), Topology(pp=2, vpp=2)], ids=str)
def test_in_the_groups_that_run(ranks: RankServer, source: Path, tmp_path: Path, topology: Topology) -> None:
    run(ranks, "in_running_groups", source, tmp_path, topology=topology)
    for folder in ("hf", "again"):
        assert payload(tmp_path / folder) == payload(source) and files(tmp_path / folder) == files(source)


def test_a_hub_as_source_and_target(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    models = {"me/code": {"config.json": (source / "config.json").read_bytes(), "modeling_own.py": b"raise SystemExit"}}
    with serving(models, gated="org/gated") as (address, fetched):
        kwargs = {"source": str(source), "endpoint": address, "cache": str(tmp_path / "cache")}
        (said,) = ranks.run(f"{CASES}:uploaded", world_size=1, kwargs=kwargs)
    assert "needs a model to export" in said["no model"]
    assert "the hub refused me/model" in said["refused"] and "HF_TOKEN" in said["refused"]
    assert said["url"] == f"{address}/me/model/commit/{COMMIT}"
    assert said["folder url"] == f"{address}/me/folder/commit/{COMMIT}"
    assert "config.json" in said["no folder"] and said["config"]
    assert said["handles"] and fetched[0] == "config.json" and fetched[1] == "config.json", "me/folder's alone, then me/code's"
    assert said["code"] == [[], ["modeling_own.py"]]
    assert said["revision"] == COMMIT and said["imported"] == (), "weights are those of the config's commit"
    assert "ask for it on" in said["gated"] and "org/gated and set HF_TOKEN" in said["gated"]
    assert models["me/folder"].keys() == {*ASSETS, "model.safetensors"}
    assert models["me/model"].keys() == {*ASSETS, "model.safetensors", "megabridge.json"}
    assert {name: models["me/model"][name] for name in ASSETS} == files(source)
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / "model.safetensors").write_bytes(models["me/model"]["model.safetensors"])
    assert payload(tmp_path / "downloaded") == payload(source)


def test_training_starts_from_an_imported_checkpoint(ranks: RankServer, tmp_path: Path) -> None:
    """checkpoint.resume takes weights without an optimizer as step 0: the run is the one that imports them itself."""
    source = tmp_path / "model"
    ranks.run("tests.support.recipes:make_source", kwargs={"folder": str(source)})
    ranks.run(f"{CASES}:imported", world_size=1, kwargs={"source": str(source), "path": str(tmp_path / "native")})
    losses = []
    for name, checkpoint in (("import", {}), ("resume", {"resume": str(tmp_path / "native")})):
        model = {"load_weights": name == "import"}
        config = values(tmp_path / name, source, Topology(), recipe={"steps": 2}, checkpoint=checkpoint, callbacks={}, model=model)
        ranks.run("tests.support.recipes:recipe", kwargs={"name": "finetune", "values": config})
        losses.append([row["validation/loss"] for row in metrics(tmp_path / name, "validation/")])
    assert losses[0] == losses[1] and losses[0][0] > losses[0][-1]
