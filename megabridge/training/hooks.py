"""Callback: the hooks of a training run. All ranks call every hook in the same order, so a hook may use collectives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabridge.training.loop import Trainer


class Callback:
    """Base class of callbacks, whose hooks do nothing: override those you need.

    A callback reads the state of `trainer` (config, chunks, bridge, step), reports with `trainer.log(metrics)` and
    `trainer.say(line)`, and adds lines to `trainer.summary` for the console to show at the end of the run.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Called before anything else in `fit`."""

    def on_import(self, trainer: Trainer, report: Any) -> None:
        """Called before the first step if Hugging Face weights were imported; `report` is the bridge's ImportReport."""

    def on_resume(self, trainer: Trainer, folder: Path) -> None:
        """Called after the run's state was read from the native checkpoint `folder`, whose run may have ended before `on_save`."""

    def before_step(self, trainer: Trainer) -> None:
        """Called before each optimizer step; `trainer.step` is the number of steps already taken."""

    def after_step(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called after each optimizer step. `metrics` is empty except on steps that are logged."""

    def before_validation(self, trainer: Trainer) -> None:
        """Called before the first validation batch."""

    def after_validation(self, trainer: Trainer, loss: float) -> None:
        """Called after validation; `loss` is the mean over all unmasked validation tokens, in nats."""

    def before_save(self, trainer: Trainer, step: int) -> None:
        """Called before a save writes anything."""

    def save_bytes(self, trainer: Trainer) -> int:
        """How many bytes `on_save` will write, all ranks together, as far as that matters for the room that a save needs."""
        return 0

    def on_save(self, trainer: Trainer, step: int, folder: Path) -> None:
        """Called after the native checkpoint (if any) of `step` is committed; `folder` is checkpoints/step_N, for more files.

        A CheckpointError for want of room has it called again, where or when there is some.
        """

    def on_stop(self, trainer: Trainer) -> None:
        """Called when a signal ends the run early, before the last save."""

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Called when the run fails; other ranks may not get here, so it must not use collectives."""

    def on_end(self, trainer: Trainer) -> None:
        """Called after the last step, validation and save."""
