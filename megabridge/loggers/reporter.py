"""Reporter: passes metrics and messages to all loggers of a run. Every rank may call it; loggers exist on rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from megabridge.config.schema import Config
from megabridge.loggers.logger import Logger
from megabridge.parallel import collectives


class Reporter:
    """Starts `loggers` on rank 0 when it is made, and finishes them once, in `close` or at the end of its `with` block."""

    def __init__(self, config: Config, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers) if collectives.rank() == 0 else []
        run_dir = Path(config.run_dir)
        for logger in self._loggers:
            run_dir.mkdir(parents=True, exist_ok=True)
            logger.start(run_dir, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Passes metrics to every logger; `step` is the number of optimizer steps taken."""
        for logger in self._loggers:
            logger.log(step, metrics)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Passes a table of texts to every logger."""
        for logger in self._loggers:
            logger.table(step, name, rows)

    def say(self, line: str) -> None:
        """Passes a line of text to every logger."""
        for logger in self._loggers:
            logger.say(line)

    def close(self) -> None:
        """Finishes every logger."""
        while self._loggers:
            self._loggers.pop().finish()
