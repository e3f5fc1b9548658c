"""Whether there is room on a disk, and what to do where there isn't. No torch; on one rank."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from megabridge.errors import CheckpointError

_SHOWN: Final = 3
"""Folders that are named as what might go."""


def problem(folder: Path, needed: int, what: str, *, removable: Sequence[Path] = (), failed: str = "") -> str:
    """Why `needed` bytes find no room below `folder`, and how much to free; "" where they do.

    `what` needs them; `removable` are folders that might go, `failed` is what a write said that found no room all the same (a
    quota). Raises CheckpointError where the disk can't be asked.
    """
    free = free_bytes(folder)
    if needed <= free and not failed:
        return ""
    what_to_do = f"free {size(max(needed - free, 1))} there" if needed > free else "make room there (a quota, or a limit of a file)"
    sizes = sorted(((size_of(each), each) for each in removable), reverse=True)[:_SHOWN]
    named = "".join(f", for instance {each.name} ({size(count)})" for count, each in sizes[:1])
    named += "".join(f" or {each.name} ({size(count)})" for count, each in sizes[1:])
    said = f" ({failed.splitlines()[0]})" if failed and needed <= free else ""
    return f"{what} needs {size(needed)}, and {folder} has {size(free)} free{said}; {what_to_do}{named}"


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which `folder` is, or would be made. Raises CheckpointError."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        return shutil.disk_usage(place).free
    except OSError as error:
        raise CheckpointError(f"{place} can't be asked for its free space ({error.strerror}); see to its file system.") from error


def size(count: int) -> str:
    """Bytes for people."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def size_of(folder: Path) -> int:
    """Bytes that go free with a folder."""
    found = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            status = Path(parent, name).lstat()
            found += status.st_blocks * 512 if status.st_nlink == 1 else 0
    return found
