"""What earlier versions wrote is read: tests/fixtures has a run's directory and an adapter of every format (tests/support/fixtures.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
from omegaconf import DictConfig, OmegaConf

from megabridge.config import schema
from megabridge.storage.metrics_file import read
from tests.support.fixtures import COMMON, ROOT
from tests.support.payload import payload
from tests.support.rank_server import RankServer

FORMATS = sorted((ROOT / "tests" / "fixtures").iterdir())


def test_there_is_one_of_every_format() -> None:
    assert FORMATS and all(folder.name.startswith("format_") for folder in FORMATS)


@pytest.mark.parametrize("kept", FORMATS, ids=lambda folder: folder.name)
def test_what_a_version_wrote_is_read(ranks: RankServer, tmp_path: Path, kept: Path) -> None:
    run = shutil.copytree(kept / "run", tmp_path / "run")
    step = run / "checkpoints" / "step_2"
    published = payload(step / "hf")

    # The config: its keys are known, and have these types.
    assert schema.typed(cast(DictConfig, OmegaConf.load(run / "config.yaml"))).config_format <= schema.CONFIG_FORMAT

    def program(*overrides: str) -> str:
        done = ranks.program([*overrides, "platform=cpu", "logger=local"], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # The manifest, and the native checkpoint's weights, assets and digests.
    program("recipe=convert", "conversion.mode=verify", f"conversion.folder={step / 'hf'}")
    (exported,) = ranks.run(
        "tests.support.fixtures:export", world_size=1, kwargs={"native": str(step / "native"), "out": str(tmp_path / "out")}
    )
    assert exported == () and payload(tmp_path / "out") == published
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((step / "hf" / "config.json").read_text())

    # What can't be gone on with is said by its settings, before shapes are compared; adapters and their scale are of the model.
    for change, line in {
        "model.hf.num_hidden_layers=3": "model.hf.num_hidden_layers: 2 -> 3",
        "peft=lora": 'peft.name: "none" -> "lora"',
    }.items():
        done = ranks.program([*COMMON, change, "recipe.steps=3", f"run_dir={run}", "checkpoint.resume=auto"], cwd=tmp_path)
        assert done.returncode and line.replace('"', "") in done.stderr.replace('"', ""), done.stderr

    # The optimizer's state and the run's settings: the third step under another layout, over the run's own metrics.
    printed = program(*COMMON, "parallel=pp2", "recipe.steps=3", f"run_dir={run}", "checkpoint.resume=auto")
    assert "step 3/3" in printed
    assert [row["step"] for row in read(run) if "train/loss" in row] == [1, 2, 3]

    # The adapter, onto the model that it is for.
    (adapted,) = ranks.run(
        "tests.support.fixtures:adapt",
        world_size=1,
        kwargs={"base": str(step / "hf"), "adapter": str(kept / "adapter"), "out": str(tmp_path / "adapter")},
    )
    name = "adapter_model.safetensors"
    assert adapted == () and (tmp_path / "adapter" / name).read_bytes() == (kept / "adapter" / name).read_bytes()
