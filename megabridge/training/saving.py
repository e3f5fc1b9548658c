"""Saves: writes the native checkpoint of a step, and removes earlier steps (keep_last, keep_best)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from megabridge.config.schema import CheckpointConfig
from megabridge.native import checkpoint
from megabridge.parallel.collectives import on_rank_zero
from megabridge.storage import folders, steps
from megabridge.training.policy import refuse_nonfinite_parameters

if TYPE_CHECKING:
    from megabridge.training.loop import Trainer


def write(trainer: Trainer) -> Path:
    """Writes the native checkpoint of the trainer's step, if enabled, and returns the step's folder. Every rank calls it.

    Raises TrainingError, before anything is written, if a parameter is not finite: the newest save is always a good one.
    """
    folder = folders.step_folder(trainer.checkpoints, trainer.step)
    refuse_nonfinite_parameters(trainer.step, trainer.chunks)
    if trainer.config.checkpoint.native:
        started = time.perf_counter()
        checkpoint.save(
            folder / folders.NATIVE,
            trainer.chunks,
            progress=checkpoint.TrainingProgress(
                trainer.step, trainer.consumed_samples, trainer.settings, recent_losses=tuple(trainer.guard.recent)
            ),
            optimizer=trainer.optimizer,
            scheduler=trainer.scheduler,
            write_assets=None if trainer.bridge is None else trainer.bridge.write_assets,
        )
        trainer.log({"checkpoint/seconds": time.perf_counter() - started})
    return folder


def prune(trainer: Trainer, folder: Path) -> None:
    """Records the validation loss of the step just saved in `folder`, and removes steps that keep_last and keep_best don't keep.

    Every rank calls it.
    """
    saving: CheckpointConfig = trainer.config.checkpoint
    loss = next((loss for step, loss in reversed(trainer.validation_losses) if step == trainer.step), None)

    def work() -> list[str]:
        said = []
        if loss is not None and saving.native:
            try:
                steps.write_validation_loss(folder, loss)
            except OSError as error:
                said.append(f"the validation loss of {folder} can't be recorded ({error.strerror}): keep_best ignores that step")
        if saving.keep_last or saving.keep_best:
            said += steps.keep(trainer.checkpoints, last=saving.keep_last or 1, best=saving.keep_best or 0)
        return said

    for line in on_rank_zero("removing old checkpoints", work):
        trainer.say(line)
