"""What one save writes, in which order, where there is room for it, and which earlier saves it removes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megabridge.config.schema import CheckpointConfig
from megabridge.errors import CheckpointError
from megabridge.native import checkpoint
from megabridge.parallel.collectives import on_rank_zero
from megabridge.storage import atomic_files, disk_room, folders, steps
from megabridge.training.policy import refuse_nonfinite_parameters

if TYPE_CHECKING:
    from megabridge.training.loop import Trainer


_TURN: Final = 2.0
"""Seconds between two looks at a full disk."""
_AGAIN: Final = 600.0
"""Seconds after which it is said again that a save waits for room."""
_FULL: Final = tuple(os.strerror(number) for number in atomic_files.NO_ROOM)


@dataclass(frozen=True)
class _Part:
    """One thing that a save writes into the step's folder."""

    bytes: int
    write: Callable[[Path], None]


def write(trainer: Trainer, *, is_last: bool = False) -> Path | None:
    """Writes all of a save of the trainer's step; returns the step's folder, None where there was no room. Every rank calls it.

    A place that lacks room is passed over for the next one (checkpoint.spare_path). Where none has room, a save that `is_last`
    waits, one on the way is left out, and with checkpoint.on_full_disk=fail either raises CheckpointError. Raises TrainingError,
    before anything is written, where a parameter is not finite: the newest save is always a good one.
    """
    refuse_nonfinite_parameters(trainer.step, trainer.chunks)
    parts, found = _parts(trainer), None
    if not parts:
        return folders.step_folder(trainer.checkpoints, trainer.step)
    said_at = -_AGAIN
    while parts:
        problem = ""
        for place in trainer.places:
            problem, found = _write_in(trainer, place, parts, found)
            if not problem:
                return found
        if trainer.config.checkpoint.on_full_disk == "fail":
            raise CheckpointError(problem)
        if not is_last:
            trainer.say(f"step {trainer.step} is not saved{' whole' if found else ''}, and the run goes on: {problem}")
            return found
        if time.monotonic() - said_at >= _AGAIN:
            said_at = time.monotonic()
            trainer.say(f"the last save waits for room: {problem}")
        on_rank_zero("waiting for room", lambda: time.sleep(_TURN))
    return found


def check_room(trainer: Trainer) -> None:
    """Raises CheckpointError, before the first step, where there is no room for a save; says so where all saves need more.

    Every rank calls it.
    """
    settings, left = trainer.config.checkpoint, trainer.config.recipe.steps - trainer.step
    count = left // settings.save_every if settings.save_every else 0
    count += int(settings.save_at_end and (not settings.save_every or left % settings.save_every != 0))
    needed = sum(part.bytes for part in _parts(trainer)) if count else 0
    if needed == 0:
        return

    def look() -> str:
        problems = [disk_room.problem(place, needed, "a save of this run") for place in trainer.places]
        if all(problems):
            raise CheckpointError(
                f"{problems[0]}, or set checkpoint.path to a folder on another disk, or checkpoint.save_at_end=false without "
                "checkpoint.save_every."
            )
        if problems[0]:
            return f"saves go to {trainer.places[1]}: {problems[0]}"
        kept = count if settings.keep_last is None and settings.keep_best is None else 1
        if kept > 1 and (short := disk_room.problem(trainer.places[0], kept * needed, f"{kept} saves of this run")):
            return f"{short}, or keep fewer with checkpoint.keep_last"
        return ""

    if line := on_rank_zero("looking for room for saves", look):
        trainer.say(line)


def _parts(trainer: Trainer) -> list[_Part]:
    """What a save writes: the native checkpoint, then what callbacks add."""
    parts = []
    if trainer.config.checkpoint.native:
        parts.append(_Part(checkpoint.size(trainer.chunks, trainer.optimizer), partial(_write_native, trainer)))
    for callback in trainer.callbacks:
        parts.append(_Part(callback.save_bytes(trainer), partial(callback.on_save, trainer, trainer.step)))
    return parts


def _write_in(trainer: Trainer, place: Path, parts: list[_Part], found: Path | None) -> tuple[str, Path | None]:
    """Writes what is left of `parts` in `place`, and takes away what is done: why it can't for want of room, and the step's folder.

    That is where the first part went.
    """
    folder = folders.step_folder(place, trainer.step)
    needed = sum(part.bytes for part in parts)
    removable = [] if place != trainer.checkpoints else sorted(folders.committed_steps(place).values())
    what = f"saving step {trainer.step}"

    def lack(failed: str = "") -> str:
        said = partial(disk_room.problem, place, needed, what, removable=[native.parent for native in removable], failed=failed)
        return on_rank_zero("looking for room for a save", said)

    if problem := lack():
        return problem, found
    while parts:
        try:
            parts[0].write(folder)
        except CheckpointError as error:
            text = str(error)
            if problem := lack(text if any(reason in text for reason in _FULL) else ""):
                return problem, found
            raise
        del parts[0]
        found = found or folder
    return "", found


def _write_native(trainer: Trainer, folder: Path) -> None:
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
