"""A logger of a test's own."""

from __future__ import annotations

from pathlib import Path
from typing import override

from megabridge.config.schema import Config
from megabridge.loggers import Logger


class Lines(Logger):
    """Keeps the lines for people in lines.txt."""

    def __init__(self) -> None:
        self.path = Path()

    @override
    def start(self, run_dir: Path, config: Config) -> None:
        self.path = run_dir / "lines.txt"

    @override
    def say(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")
