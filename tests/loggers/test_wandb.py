"""Weights & Biases without a network or an account, and with everything that can go wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from megabridge.config.schema import Config, ModelConfig
from megabridge.errors import ConfigError
from megabridge.loggers.wandb import WandB, resolved_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_offline_run_leaves_its_metrics_in_the_run_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    logger = WandB(tags=["a"])
    logger.start(run_dir, Config(model=ModelConfig(name="tiny")))
    logger.log(1, {"train/loss": 2.0})
    logger.log(1, {"validation/loss": 3.0})
    logger.table(1, "generations", [{"prompt": "hello", "text": "world"}])
    logger.finish()
    (written,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"validation/loss" in content
    assert not list(tmp_path.glob("wandb"))
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/generations*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["step", "prompt", "text"],
        "data": [["1", "hello", "world"]],
    }


def test_mode_follows_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    assert resolved_mode("auto") == "online"
    (tmp_path / "netrc").write_text("not a netrc file")
    assert resolved_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolved_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolved_mode("auto") == "disabled"
    assert resolved_mode("offline") == "offline"


class Broken:
    """A wandb run whose calls fail."""

    def __init__(self) -> None:
        self.calls = 0

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def log(self, values: dict[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("500 Internal Server Error")

    def finish(self) -> None:
        raise AssertionError("given up before")


def test_fault_30_an_error_is_said_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    logger = WandB()
    logger.start(tmp_path, Config())
    for step in range(3):
        logger.log(step, {"train/loss": 1.0})
    logger.finish()
    assert run.calls == 1
    assert capsys.readouterr().out.count("500 Internal Server Error; the run goes on without it") == 1


def test_an_unreachable_server_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = []

    def init(**settings: Any) -> Broken:
        modes.append(settings["mode"])
        if settings["mode"] == "online":
            raise ConnectionError("no route to host")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    started = time.monotonic()
    WandB().start(tmp_path, Config())
    assert modes == ["online", "offline"] and time.monotonic() - started < 5
    assert "logging offline instead" in capsys.readouterr().out


def test_fault_24_secrets_do_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: given.update(settings) or Broken())
    data = {"_target_": "mine.Data", "api_key": "hunter2hunter2", "nested": {"password": "hunter2"}}
    WandB().start(tmp_path, Config(data=data))
    assert "hunter2" not in str(given["config"])
    (tmp_path / "config.yaml").write_text("data: {api_key: '${oc.env:KEY}'}")
    WandB().start(tmp_path, Config(data=data))
    assert given["config"] == {"data": {"api_key": "${oc.env:KEY}"}}


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logger\.wandb\.mode='on' must be one of auto, online, offline, disabled"):
        WandB(mode="on")
