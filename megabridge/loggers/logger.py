"""Logger, the base class of loggers. Imports neither torch nor megatron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megabridge.config.schema import Config


class Logger:
    """Base class of loggers, whose methods do nothing: override those you need. An error that a logger raises ends the run."""

    def start(self, run_dir: Path, config: Config) -> None:
        """Called before the first message. `run_dir` exists; files should be written below it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics, with names like train/loss; `step` is the number of optimizer steps taken."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Logs a table of texts, e.g. generations: at least one row, all with the same columns."""

    def say(self, line: str) -> None:
        """Logs a line of text."""

    def finish(self) -> None:
        """Called after the last message, also when the run failed."""
