"""parallel=auto: what is chosen here, what stays, and what a resumed run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.launchers import chosen_layout, slurm
from megabridge.launchers.prepare import resolve
from megabridge.launchers.settings import SlurmSettings
from megabridge.parallel import hardware
from megabridge.storage import folders
from tests.support.compose import compose
from tests.support.rank_server import RankServer

TINY = ("model=tiny_llama", "parallel=auto", "platform=cpu")


def settled(tmp_path: Path, *overrides: str, started: int | None = None) -> tuple[dict[str, Any], dict[str, Any], Config]:
    """(what config.yaml would have, what ranks get, the config) of a run after its layout is chosen."""
    cfg = compose(*overrides)
    values, config = resolve(cfg, tmp_path, overrides)
    config = chosen_layout.settle(cfg, values, config, overrides, lambda: chosen_layout.here(config, started))
    written: Any = OmegaConf.to_container(cfg, resolve=False)
    return written, values, config


def sizes(config: Config) -> dict[str, Any]:
    return {name: getattr(config.parallel, name) for name in ("tp", "pp", "cp", "ep", "dp")}


def test_the_choice_stands_in_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, values, config = settled(tmp_path, *TINY, "plan.gpus=4")
    assert written["parallel"] == values["parallel"] and not config.parallel.auto
    size = config.parallel.tp * config.parallel.pp * config.parallel.cp * (config.parallel.dp or 0)
    assert size == 4 and not chosen_layout.is_open(config)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("megabridge: parallel=auto: ") and " on 4 x cpu: expected " in line and "the fastest of " in line
    assert not settled(tmp_path, "model=tiny_llama", "parallel=tp2")[2].parallel.auto and not capsys.readouterr().out


def test_what_is_typed_stays(tmp_path: Path) -> None:
    for given in ({"tp": 2}, {"pp": 2}, {"tp": 1, "pp": 1}):
        typed = [f"parallel.{name}={size}" for name, size in given.items()]
        config = settled(tmp_path, *TINY, "plan.gpus=4", *typed)[2]
        assert given.items() <= sizes(config).items() and (config.parallel.dp or 0) >= 1
    with pytest.raises(ConfigError, match="allows no layout of 4 processes"):
        settled(tmp_path, *TINY, "plan.gpus=4", "parallel.dp=3")
    with pytest.raises(ConfigError, match=r"chooses a layout for recipe=finetune.*name one for recipe\.target=recipes"):
        settled(tmp_path, *TINY, "recipe=convert")
    with pytest.raises(ConfigError, match=r"so .* GiB are missing"):
        settled(tmp_path, *TINY, "plan.gpus=2", "plan.figures.memory_gib=0.0001")


def test_processes_are_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(*overrides: str, started: int | None = None) -> int:
        parallel = settled(tmp_path, *TINY, *overrides, started=started)[2].parallel
        return parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 0)

    monkeypatch.setattr(hardware, "cores", lambda: 7)
    assert count() == 6, "seven allow no layout of this batch"
    assert count(started=2) == 2 and count("plan.gpus=3") == 3
    with pytest.raises(ConfigError, match="allows no layout of 7 processes"):
        count("plan.gpus=7")


def test_a_resumed_run_keeps_its_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "checkpoints" / "step_2" / "native"
    step.mkdir(parents=True)
    for name in (folders.MARKER, ".metadata"):
        (step / name).touch()
    for resume in ("auto", str(step), str(step.parent)):
        for made in (
            {"tp": 2, "pp": 2, "vpp": 1, "cp": 1, "ep": 1, "etp": None, "dp": 1},
            {"tp": 2, "pp": 1, "vpp": 1, "cp": 1, "ep": 1},
        ):
            (tmp_path / "config.yaml").write_text(yaml.safe_dump({"parallel": made}))
            config = settled(tmp_path, *TINY, "plan.gpus=4", f"checkpoint.resume={resume}")[2]
            assert (config.parallel.tp, config.parallel.pp, config.parallel.dp) == (2, made["pp"], 2 // made["pp"])
            assert "the layout that the resumed run had" in capsys.readouterr().out
    told = settled(tmp_path, *TINY, "plan.gpus=4", "parallel.tp=1", f"checkpoint.resume={step}")[2]
    assert told.parallel.tp == 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"parallel": {**made, "dp": 2, "tp": 8}}))
    settled(tmp_path, *TINY, "plan.gpus=8", f"checkpoint.resume={step}")
    capsys.readouterr()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"parallel": {**made, "tp": 1, "dp": 8}}))
    settled(tmp_path, *TINY, "plan.gpus=8", "recipe.global_batch_size=4", f"checkpoint.resume={step}")
    assert "; the resumed run's dp8 is no longer allowed: recipe.global_batch_size=4" in capsys.readouterr().out
    for content in ("parallel: {tp: x}", "parallel: []", "- 1", "{"):
        (tmp_path / "config.yaml").write_text(content)
        settled(tmp_path, *TINY, "plan.gpus=4", f"checkpoint.resume={step}")
        assert "the fastest of" in capsys.readouterr().out


def test_a_plan_learns_of_the_command_and_a_queue_says_what_it_has(tmp_path: Path) -> None:
    overrides = (
        "recipe=plan",
        "model=tiny_llama",
        "plan.gpus=8",
        "plan.device=h100",
        "parallel.tp=1",
        "recipe.seq_length=64",
        "run_dir=x",
    )
    written, values, config = settled(tmp_path, *overrides)
    assert config.plan.arguments == values["plan"]["arguments"] == ["model=tiny_llama", "parallel.tp=1", "recipe.seq_length=64"]
    assert written["plan"]["arguments"] == [] and chosen_layout.is_open(config)
    with pytest.raises(ConfigError, match=r"plan\.device=h1 must be one of"):
        settled(tmp_path, "recipe=plan", "model=tiny_llama", "plan.gpus=8", "plan.device=h1")
    runner = slurm.runner(SlurmSettings())
    with pytest.raises(ConfigError, match=r"needs plan\.gpus and plan\.device"):
        runner.machine(config.__class__())
    assert runner.machine(config).count == 8


@pytest.mark.parametrize("count", [2, 4])
def test_it_trains_and_resumes(ranks: RankServer, tmp_path: Path, count: int) -> None:
    command = (
        f"model=tiny_llama data=random_tokens callbacks=none checkpoint.hf=false logger=local parallel=auto plan.gpus={count} "
        "recipe.seq_length=32 scheduler.warmup_steps=0 run_dir=run"
    )
    done = ranks.program(f"{command} recipe.steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parallel=auto: " in done.stdout and f" on {count} x cpu: expected " in done.stdout
    parallel = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["parallel"]
    assert parallel["auto"] is False and parallel["tp"] * parallel["pp"] * parallel["dp"] == count
    again = ranks.program(f"{command} recipe.steps=2 checkpoint.resume=auto", cwd=tmp_path)
    assert again.returncode == 0 and "the layout that the resumed run had" in again.stdout, again.stdout + again.stderr
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["parallel"] == parallel
    refused = ranks.program(f"{command} plan.figures.memory_gib=0.0001", cwd=tmp_path)
    assert refused.returncode == 2 and "GiB are missing" in refused.stderr
