"""Checkpoint folders on disk: <run>/checkpoints/step_N/native, and when one counts as committed.

A folder is written under a temporary name beside its final one, every file and folder is fsynced, and one rename
publishes it. So a folder that bears its final name is complete, and whatever bears a temporary name is left over from a
killed save. No torch here; where there are many ranks, one of them calls these.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import IO, Final

from megabridge.errors import CheckpointError

NATIVE: Final = "native"
PARTIAL_SUFFIX: Final = ".partial"
REMOVED_SUFFIX: Final = ".removed"
# Written last by megatron-core into a distributed checkpoint; its presence is part of "committed".
MARKER: Final = "metadata.json"
_STEP: Final = re.compile(r"step_(\d+)")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where everything of one step lives: checkpoints/step_N."""
    return checkpoints / f"step_{step}"


def is_committed(folder: Path) -> bool:
    """Whether `folder` is a complete native checkpoint."""
    return (folder / MARKER).is_file() and (folder / ".metadata").is_file()


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """The native folders of all committed steps below `checkpoints`, by step, lowest first.

    The step in the folder's name decides, never a time stamp: clocks of two hosts differ.
    """
    found = {}
    for entry in checkpoints.iterdir() if checkpoints.is_dir() else ():
        match = _STEP.fullmatch(entry.name)
        if match and is_committed(entry / NATIVE):
            found[int(match[1])] = entry / NATIVE
    return dict(sorted(found.items()))


def latest(checkpoints: Path) -> Path | None:
    """The native folder of the highest committed step, or None."""
    return next(reversed(committed_steps(checkpoints).values()), None)


def partial_of(folder: Path) -> Path:
    """The temporary name under which `folder` is written."""
    return folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")


def begin(folder: Path) -> Path:
    """Makes an empty temporary sibling of `folder` and returns it. Raises CheckpointError where `folder` exists."""
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists already and is not overwritten; start in another run folder, or continue it with "
            "checkpoint.resume=auto."
        )
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit(folder: Path, *, replace: bool = False) -> None:
    """Publishes the temporary sibling of `folder` under its final name, after everything in it is on disk.

    With `replace`, a folder of that name is moved aside first and removed last: a kill between the two renames leaves it whole
    under a hidden name ending in `.removed`.
    """
    partial = partial_of(folder)
    for parent, _, files in os.walk(partial, topdown=False):
        for name in files:
            fsync(Path(parent, name))
        fsync(Path(parent))
    old = folder.with_name(f".{folder.name}{REMOVED_SUFFIX}")
    if replace and folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    # The rename, and the step folder itself, are entries in their parents.
    fsync(folder.parent)
    fsync(folder.parent.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_orphans(checkpoints: Path) -> list[Path]:
    """Removes what killed saves and removals left below `checkpoints`; returns it. Call under `lock`."""
    orphans = []
    for entry in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if entry.name.endswith(REMOVED_SUFFIX):
            orphans.append(entry)
        elif _STEP.fullmatch(entry.name):
            partial = partial_of(entry / NATIVE)
            orphans.extend([partial] if partial.exists() else [])
    for orphan in orphans:
        shutil.rmtree(orphan)
        if _STEP.fullmatch(orphan.parent.name) and not any(orphan.parent.iterdir()):
            orphan.parent.rmdir()
    return orphans


def keep_last(checkpoints: Path, count: int) -> None:
    """Removes all but the newest `count` committed steps, exports included."""
    for native in list(committed_steps(checkpoints).values())[:-count]:
        step = native.parent
        # Renamed first: a removal that is killed half-way leaves no step that looks committed.
        doomed = step.rename(step.with_name(step.name + REMOVED_SUFFIX))
        shutil.rmtree(doomed)


def lock(checkpoints: Path) -> IO[str]:
    """Claims `checkpoints` for this process until the returned file is closed.

    Raises CheckpointError where another process has it: two runs that save into one folder destroy each other's steps.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    file = (checkpoints / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise CheckpointError(
            f"{checkpoints} is in use by another run; wait for it to end, or give this run its own folder."
        ) from error
    return file


def fsync(path: Path) -> None:
    """Makes a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
