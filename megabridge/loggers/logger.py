"""What a logger is. No torch, no megatron: a logger of your own needs neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megabridge.config.schema import Config


class Logger:
    """A base whose methods do nothing: override those you need. An error that a logger raises ends the run."""

    def start(self, run_dir: Path, config: Config) -> None:
        """Before the first message. `run_dir` exists; files belong below it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one moment, named like train/loss; `step` is the number of optimizer steps taken."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Texts of one moment, e.g. generations: at least one row, and all have the same columns."""

    def say(self, line: str) -> None:
        """A line for people."""

    def finish(self) -> None:
        """After the last message, also of a run that failed."""
