"""Console logger: one line per logged step, validation and report. A progress bar stays below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, override

from rich.console import Console as RichConsole

from megabridge.config.schema import Config
from megabridge.loggers.logger import Logger
from megabridge.storage import start_lines

# How a metric is written in a line; those that matter most come first. Others come last, under their own names.
_SHORT: Final[dict[str, str]] = {
    "train/loss": "loss {:.4f}",
    "train/learning_rate": "lr {:.2e}",
    "train/tokens_per_second": "{:,.0f} tokens/s",
    "train/padding": "pad {:.0%}",
    "train/skipped_steps": "{:.0f} skipped",
    "train/grad_norm": "norm {:.3g}",
    "train/mfu": "MFU {:.1%}",
    "train/memory_gib": "{:.1f} GiB",
    "train/loss_scale": "scale {:.0f}",
    "train/tflops_per_device": "{:.1f} TFLOP/s",
    "validation/loss": "validation loss {:.4f}",
    "validation/perplexity": "perplexity {:.3f}",
    "validation/tokens": "{:,.0f} tokens",
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
_ZEROS: Final = ("0.0 TFLOP/s", "MFU 0.0%", "pad 0%")
"""What says nothing: a CPU's, or a tiny model's, or of rows without padding."""
_WIDTH: Final = 80
"""Columns of a step's line where it isn't a terminal's; metrics.jsonl has what finds no place."""
_ROWS: Final = 2
"""Number of a table's rows that are printed; files have all."""

stdout: Final = RichConsole(highlight=False, soft_wrap=True)
"""Console shared by bars and lines, so that they don't overwrite each other."""


class Console(Logger):
    """Prints to standard output, with colours and bars on a terminal and as plain lines elsewhere, and keeps it in console.log."""

    def __init__(self) -> None:
        self._steps = 0
        self._first: tuple[int, float] | None = None

    @override
    def start(self, run_dir: Path, config: Config) -> None:
        self._steps, self._first = config.recipe.steps, None
        start_lines.keep_in(run_dir)
        self.say(f"run directory {run_dir}")

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = {name: value for name, value in metrics.items() if not name.startswith(_HIDDEN)}
        if not shown:
            return
        places = {name: place for place, name in enumerate(_SHORT)}
        parts = [_written(name, shown[name]) for name in sorted(shown, key=lambda name: places.get(name, len(places)))]
        parts = [part for part in parts if part not in _ZEROS]
        if "train/loss" in metrics and (left := self._left(step, metrics)):
            parts.insert(1, left)
        width = stdout.width if stdout.is_terminal else _WIDTH
        self.say(_fitting(f"step {step}/{self._steps}", parts, width - len(start_lines.line(""))))

    def _left(self, step: int, metrics: Mapping[str, float]) -> str:
        """The time that the steps after this one will take, at the pace of all until now."""
        now = start_lines.elapsed()
        first, began = self._first or (step - 1, now - metrics.get("train/step_seconds", 0.0))
        self._first = first, began
        if step >= self._steps:
            return ""
        return f"{start_lines.duration((now - began) / (step - first) * (self._steps - step))} left"

    @override
    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        for row in rows[:_ROWS]:
            self.say(f"{name}  " + "  ".join(f"{column}: {' '.join(text.split())}" for column, text in row.items()))
        if len(rows) > _ROWS:
            self.say(f"{name}  ... and {len(rows) - _ROWS} more")

    @override
    def say(self, line: str) -> None:
        text = start_lines.line(line)
        stdout.print(text, markup=False)
        start_lines.record(text)


def _written(name: str, value: float) -> str:
    return _SHORT[name].format(value) if name in _SHORT else f"{name} {value:.4g}"


def _fitting(head: str, parts: Sequence[str], width: int) -> str:
    """`head` and as many of `parts`, in their order, as find a place in `width` columns; the first one always does."""
    line = head
    for number, part in enumerate(parts):
        if number == 0 or len(line) + 2 + len(part) <= width:
            line += f"  {part}"
    return line
