"""Weights & Biases logger. The only module that imports wandb, and only when a run starts.

A run never depends on it: without an account or a network it writes to the run's directory (`wandb sync` uploads it
later), and after an error, which is printed once, the run continues without it.
"""

from __future__ import annotations

import dataclasses
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast, override

from omegaconf import OmegaConf

from megabridge.config import redaction
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.loggers.logger import Logger

MODES: Final = ("auto", "online", "offline", "disabled")
_INIT_TIMEOUT: Final = 20.0  # seconds that a run waits for an unreachable server, once


class WandB(Logger):
    """Logs metrics, tables and the redacted config.

    `mode` auto is online where WANDB_API_KEY is set or ~/.netrc has the host, else offline; WANDB_MODE, if set, replaces auto.
    """

    def __init__(
        self,
        project: str = "megabridge",
        *,
        entity: str | None = None,
        name: str | None = None,
        mode: str = "auto",
        tags: tuple[str, ...] | list[str] = (),
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"logger.wandb.mode={mode!r} must be one of {', '.join(MODES)}.")
        self.project = project
        self.entity = entity
        self.name = name
        self.mode = mode
        self.tags = list(tags)
        self._run: Any = None

    @override
    def start(self, run_dir: Path, config: Config) -> None:
        self._safely(lambda: self._init(run_dir, config))

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._safely(lambda: self._run.log({"step": step, **metrics}))

    @override
    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        if self._run is not None:
            self._safely(lambda: self._log_table(step, name, rows))

    @override
    def finish(self) -> None:
        if self._run is not None:
            self._safely(self._close)
            self._run = None

    def _init(self, run_dir: Path, config: Config) -> None:
        mode = resolved_mode(self.mode)
        try:
            self._run = self._opened(mode, run_dir, config)
        except Exception as error:
            if mode != "online":
                raise
            print(f"wandb: {type(error).__name__}: {error}; logging offline instead", flush=True)
            self._run = self._opened("offline", run_dir, config)
        # The step is logged as a metric, since validation and reports of one step are logged separately.
        self._run.define_metric("*", step_metric="step")

    def _opened(self, mode: str, run_dir: Path, config: Config) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or run_dir.name,
            mode=cast(Any, mode),
            tags=self.tags,
            dir=str(run_dir),
            config=_safe_config(run_dir, config),
            settings=wandb.Settings(
                init_timeout=_INIT_TIMEOUT, silent=True, console="off", disable_git=True, disable_code=True, save_code=False
            ),
        )

    def _log_table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        import wandb

        data = [[str(step), *row.values()] for row in rows]
        self._run.log({"step": step, name: wandb.Table(columns=["step", *rows[0]], data=data)})

    def _close(self) -> None:
        import wandb

        self._run.finish()
        # Ends wandb's own process, which may still be writing the run's file on a busy machine.
        wandb.teardown()

    def _safely(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        self._run = None
        print(f"wandb: {why}; the run goes on without it, metrics.jsonl has everything", flush=True)


def resolved_mode(mode: str) -> str:
    """Resolves `mode`: auto becomes WANDB_MODE, online or offline."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_knows_wandb() else "offline"


def _safe_config(run_dir: Path, config: Config) -> Any:
    """The config without secrets; the run's config.yaml, if there is one, also hides values that came from the environment."""
    written = run_dir / "config.yaml"
    if written.is_file():
        return OmegaConf.to_container(OmegaConf.load(written), resolve=False)
    values = dataclasses.asdict(config)
    return redaction.redacted(values, values)


def _netrc_knows_wandb() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
