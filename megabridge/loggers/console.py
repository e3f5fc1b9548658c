"""Console logger: one line per logged step, validation and report. A progress bar stays below them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, override

from rich.console import Console as RichConsole

from megabridge.config.schema import Config
from megabridge.loggers.logger import Logger

# Label and format of a metric in a line; others are printed under their own names.
_SHORT: Final[dict[str, tuple[str, str]]] = {
    "train/loss": ("loss", ".4f"),
    "train/grad_norm": ("gradient norm", ".3f"),
    "train/learning_rate": ("lr", ".2e"),
    "train/tokens_per_second": ("tokens/s", ",.0f"),
    "train/tflops_per_device": ("TFLOP/s", ".1f"),
    "train/mfu": ("MFU", ".1%"),
    "train/memory_gib": ("GiB", ".1f"),
    "train/skipped_steps": ("skipped", ".0f"),
    "train/loss_scale": ("loss scale", ".0f"),
    "validation/perplexity": ("perplexity", ".3f"),
    "validation/loss": ("validation loss", ".4f"),
    "validation/tokens": ("over tokens", ",.0f"),
}
# Metrics that follow from others in the line, that a callback prints itself, or that only files need.
_HIDDEN: Final = (
    "train/loss_tokens",
    "train/consumed_samples",
    "train/step_seconds",
    "validation/seconds",
    "checkpoint/",
    "import/",
    "export/",
    "parity/",
    "evaluation/",
)
_ROWS: Final = 2
"""Number of a table's rows that are printed; files have all."""

stdout: Final = RichConsole(highlight=False, soft_wrap=True)
"""Console shared by bars and lines, so that they don't overwrite each other."""


class Console(Logger):
    """Prints to standard output, with colours and bars on a terminal and as plain lines elsewhere."""

    def __init__(self) -> None:
        self._steps = 0
        self._started = time.monotonic()

    @override
    def start(self, run_dir: Path, config: Config) -> None:
        self._steps = config.recipe.steps
        self._started = time.monotonic()
        self.say(f"run directory {run_dir}")

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [_written(name, value) for name, value in metrics.items() if not name.startswith(_HIDDEN)]
        if parts:
            self.say(f"step {step}/{self._steps}  {'  '.join(parts)}")

    @override
    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        for row in rows[:_ROWS]:
            self.say(f"{name}  " + "  ".join(f"{column}: {' '.join(text.split())}" for column, text in row.items()))
        if len(rows) > _ROWS:
            self.say(f"{name}  ... and {len(rows) - _ROWS} more")

    @override
    def say(self, line: str) -> None:
        stdout.print(f"[{time.monotonic() - self._started:7.1f} s] {line}", markup=False)


def _written(name: str, value: float) -> str:
    short, form = _SHORT.get(name, (name, ".4g"))
    return f"{short} {value:{form}}"
