"""Shows a progress bar over the steps, on a terminal only. Elsewhere the console logger's lines show the progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, override

from rich import progress as rich_progress

from megabridge.loggers.console import stdout
from megabridge.training.hooks import Callback

if TYPE_CHECKING:
    from megabridge.training.loop import Trainer


class Progress(Callback):
    """Shows the steps done, the last loss and the remaining time. Only rank 0 draws it."""

    def __init__(self) -> None:
        self._bar: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)

    @override
    def before_step(self, trainer: Trainer) -> None:
        if self._bar is None and trainer.is_main and stdout.is_terminal:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeRemainingColumn(),
                console=stdout,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=trainer.config.recipe.steps, completed=trainer.step)
            self._bar.start()

    @override
    def after_step(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if self._bar is not None:
            description = f"training  loss {metrics['train/loss']:.4f}" if metrics else None
            self._bar.update(self._task, completed=trainer.step, description=description)
            if trainer.step == trainer.config.recipe.steps:
                self._stop()

    @override
    def on_stop(self, trainer: Trainer) -> None:
        self._stop()

    @override
    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        bar: Any = self._bar
        if bar is not None:
            bar.stop()
            self._bar = None
