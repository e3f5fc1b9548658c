"""Safe listing of untrusted folders: refuses links that lead out of the folder.

Otherwise their targets would be copied into exports and native checkpoints, and uploaded from there. No torch here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from megabridge.errors import CheckpointError
from megabridge.storage import regular_files

_SHARED_BLOB: Final = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})")


def inside(folder: Path, name: str) -> Path:
    """Returns the real path of the regular file `name`, a path in `folder`; links may lead anywhere in the folder.

    In a folder of the hub's cache they may lead to the blobs of its repository too. Raises CheckpointError for anything else.
    """
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve()
        mode = real.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # missing, too long, not encodable, or a cycle of links
        raise CheckpointError(f"{str(path)[:1000]!r} must exist ({regular_files.reason(error)}); fetch it again.") from None
    if not real.is_relative_to(home) and not _is_blob(real, home):
        raise CheckpointError(f"{path} must lie inside its folder, but leads to {real}; copy the file there.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} must be a file, not {regular_files.kind(mode)}; fetch it again.")
    return real


def _is_blob(real: Path, home: Path) -> bool:
    """Whether `real` is a blob that links in `home` may lead to: <cache>/models--org--name/snapshots/<commit>/x ->
    ../../blobs/<hash>.

    The hub may share a blob between repositories, as <cache>/blobs/<2 digits>/<64 digits>.
    """
    for place in (home, *home.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            shared = repository.parent / "blobs"
            return real.parent == repository / "blobs" or (
                real.is_relative_to(shared) and _SHARED_BLOB.fullmatch(str(real.relative_to(shared))) is not None
            )
    return False


def entries(folder: Path, *, apart: Collection[str] = ()) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (path in the folder, lstat result) for everything below `folder` except non-empty folders. No link is followed.

    Folders in `apart` are yielded themselves, without their contents. Raises CheckpointError for a folder that can't be read.
    """
    below = [""]
    while below:
        place = below.pop()
        try:
            with os.scandir(folder / place) as opened:
                found = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in opened)
            if place and not found:
                yield place, os.lstat(folder / place)
        except OSError as error:
            raise CheckpointError(f"{folder / place} can't be read: {error.strerror}; allow it, or use another folder.") from error
        for last, state in found:
            name = f"{place}/{last}" if place else last
            if stat.S_ISDIR(state.st_mode) and name not in apart:
                below.append(name)
            else:
                yield name, state
