"""Records the files that a process has memory-mapped, so that its launcher can explain a SIGBUS (a truncated file)."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Final

SIZE: Final = 65536  # bytes of a note
_kept: Final[list[tuple[mmap.mmap, list[tuple[str, int]]]]] = []


def new_note(descriptor: int = -1) -> mmap.mmap:
    """Allocates the note of a process: memory shared with forked children, or the first SIZE bytes of an open file.

    If the file system has no room for it, private memory, which the launcher can't read.
    """
    if descriptor >= 0:
        try:
            # Without a reserved block the first write to a page could end the process (SIGBUS).
            os.posix_fallocate(descriptor, 0, SIZE)
        except OSError:
            descriptor = -1
    return mmap.mmap(descriptor, SIZE)


def set_note(note: mmap.mmap) -> None:
    """Sets the note of this process, to which `note_mapping` writes; without one it does nothing."""
    _kept[:] = [(note, [])]


def note_mapping(file: Path, size: int) -> None:
    """Records that `file`, of `size` bytes, is read through a mapping from now on."""
    for note, files in _kept:
        files.append((str(file), size))
        text = json.dumps(files[-200:]).encode()[: SIZE - 1]
        note[: len(text) + 1] = text + b"\0"


def truncated_files(note: mmap.mmap) -> str:
    """Names the files in a dead process's note that have become smaller, as the end of a sentence; "" for none."""
    text = note[:].partition(b"\0")[0]
    try:
        files = json.loads(text) if text else []
    except ValueError:  # the process died while writing the note
        return ""
    now = {name: Path(name).stat().st_size if Path(name).is_file() else 0 for name, _ in files}
    found = [f"{name} had {size} bytes and now has {now[name]}" for name, size in files if now[name] < size]
    return f": {'; '.join(found)}" if found else ""
