"""Saved steps of a run: invalid ones, clean-up after killed saves, and retention (keep_last, keep_best). No torch; on one rank."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from megabridge.errors import CheckpointError, ConfigError, listed, said
from megabridge.storage import atomic_files, folders, regular_files
from megabridge.storage.folders import (
    LOCK_SUFFIX,
    NATIVE,
    PARTIAL_SUFFIX,
    REMOVED_SUFFIX,
    committed_steps,
    is_committed,
    recover,
)

VALIDATION: Final = "validation.json"
CHECKPOINTS: Final = "checkpoints"


def places(run_dir: Path, path: str | None, spare_path: str | None) -> list[Path]:
    """Where the steps of the run in `run_dir` are: checkpoint.path or its own folder, then its part of checkpoint.spare_path."""
    found = [Path(path) if path else run_dir / CHECKPOINTS]
    if spare_path:
        # Runs may share a spare disk, and their directories' last names are often equal.
        number = sha256(os.fsencode(run_dir.absolute())).hexdigest()[:8]
        found.append(Path(spare_path).expanduser() / f"{run_dir.name}-{number}")
    return found


def saved_in(places: Sequence[Path]) -> dict[int, Path]:
    """Returns the native folders of a run's committed steps, by step; of one that is in several `places` the first counts."""
    saved: dict[int, Path] = {}
    for place in reversed(places):
        saved |= committed_steps(place)
    return saved


def invalid(checkpoints: Path) -> dict[int, str]:
    """Returns what is wrong with entries of `checkpoints` that have a step's name but are none, by step, lowest first.

    `committed_steps` and `keep` ignore them; a save of that step would collide with them.
    """
    found = {}
    for step, entry in folders.numbered(checkpoints).items():
        try:
            next(entry.iterdir(), None)
        except OSError as error:
            kind = "a link" if entry.is_symlink() else "an entry"
            found[step] = f"{entry.name} is {kind} that can't be read as a folder ({error.strerror})"
            continue
        native = entry / NATIVE
        if (native.is_symlink() or native.exists()) and not is_committed(native):
            found[step] = f"{entry.name}/{NATIVE} is no complete native checkpoint"
    return found


def remove_orphans(checkpoints: Path) -> list[str]:
    """Removes leftovers of killed saves and removals in `checkpoints`, under `lock`; returns a line for each failure."""
    problems = []
    for entry in folders.entries(checkpoints):
        try:
            if entry.name.endswith(REMOVED_SUFFIX):
                folders.remove(entry)
            elif folders.STEP.fullmatch(entry.name) and regular_files.is_folder(entry):
                _clean(entry)
        except OSError as error:
            problems.append(f"{entry} holds leftovers of a killed save, which can't be removed ({error.strerror}); remove them")
    return problems


def _clean(step: Path) -> None:
    """Removes leftovers of killed saves in a step's folder, and the folder if it is empty then. Raises OSError."""
    for left in step.glob(f".*{REMOVED_SUFFIX}"):
        recover(step / left.name[1 : -len(REMOVED_SUFFIX)])
    left_over = [entry for entry in step.iterdir() if entry.name.endswith((PARTIAL_SUFFIX, LOCK_SUFFIX))]
    for entry in left_over:
        folders.remove(entry)
    if left_over and not step.is_symlink() and not any(step.iterdir()):
        step.rmdir()


def write_validation_loss(step: Path, loss: float) -> None:
    """Writes the validation loss of a saved step to its folder, for `keep`. Raises OSError."""
    atomic_files.write(step / VALIDATION, json.dumps({"loss": loss}) + "\n")
    folders.fsync(step)


def read_validation_loss(step: Path) -> float:
    """Reads the validation loss of a saved step; infinite if it was not validated. Raises CheckpointError if it can't be read."""
    file = step / VALIDATION
    if not file.is_file():
        return math.inf
    try:
        loss = json.loads(regular_files.read(file))["loss"]
        if type(loss) in (int, float):
            return math.inf if math.isnan(loss) else float(loss)
        reason = f"loss is {loss!r}"
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reason = said(error)
    raise CheckpointError(f'{file} must be {{"loss": a number}}, but {reason}; remove the file, or the step.')


def keep(checkpoints: Path, *, last: int, best: int) -> list[str]:
    """Removes all committed steps, with their exports, except the newest `last` and the `best` with lowest validation loss.

    A step whose validation loss can't be read is kept too, and so is the target of a link. Returns lines to print.
    """
    steps = [native.parent for native in committed_steps(checkpoints).values()]
    losses, problems, kept = dict[Path, float](), list[str](), set(steps[-last:])
    for step in steps:
        try:
            losses[step] = read_validation_loss(step)
        except CheckpointError as error:
            problems.append(f"{step.name} is kept: {error}")
            kept.add(step)
    kept |= set(sorted((step for step in losses if losses[step] < math.inf), key=losses.__getitem__)[:best])
    for step in steps:
        if step in kept:
            continue
        if step.is_symlink():
            problems.append(f"{step.name} is a link, which is removed; what it leads to is kept: {step.resolve()}")
        try:
            # Renamed first, so that a removal that is killed half-way leaves no step that looks committed.
            folders.remove(step.rename(step.with_name(step.name + REMOVED_SUFFIX)))
        except OSError as error:
            problems.append(f"{step.name} can't be removed ({error.strerror}); remove it by hand")
    return problems


def source(resume: str, last_step: int, places: Sequence[Path]) -> Path | None:
    """The native folder that checkpoint.resume means in a run of `last_step` steps, or None to begin at step 0.

    `places` are where the run's steps are; of one that is in several the first counts. Raises ConfigError where the run would later
    meet steps that another run left there, or what is no step.
    """
    saved, checkpoints = saved_in(places), places[0]
    if resume == "auto":
        start = max(saved, default=0)
        found = saved.get(start)
    elif resume == "none":
        found, start = None, 0
    else:
        found = regular_files.expand(resume)
        if not is_committed(found) and is_committed(found / NATIVE):
            found = found / NATIVE
        if not is_committed(found):
            raise ConfigError(
                f"checkpoint.resume={resume} must be none, auto or the folder of a saved step; there is no complete "
                "native checkpoint there."
            )
        here = [step for step, folder in saved.items() if folder.resolve() == found.resolve()]
        start = here[0] if here else 0
    others = [each for place in places for each in invalid(place).items()]
    if in_the_way := [line for step, line in others if start < step <= last_step]:
        raise ConfigError(
            f"{checkpoints} must have room for the steps that this run saves after step {start}; remove or rename what is in the "
            f"way:\n  {listed(in_the_way)}"
        )
    later = sorted(step for step in saved if step > start)
    if later:
        raise ConfigError(
            f"checkpoint.resume={resume} would run over step_{later[0]} that is already in {saved[later[0]].parents[1]}; use "
            "checkpoint.resume=auto to continue it, or another run directory."
        )
    return found
