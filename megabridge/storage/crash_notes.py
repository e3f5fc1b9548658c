"""What a process reads through mappings, noted where its launcher finds it: a process that SIGBUS ends can't say it itself."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Final

SIZE: Final = 65536  # bytes of a note
_kept: Final[list[tuple[mmap.mmap, list[tuple[str, int]]]]] = []


def new_note(descriptor: int = -1) -> mmap.mmap:
    """Memory for one process's note: shared with forked children, or the first SIZE bytes of an open file.

    Where there is no room for these, memory of this process alone: a note that nobody finds, and no SIGBUS.
    """
    if descriptor >= 0:
        try:
            # A page that the file system had no block for would end the process when it is first written.
            os.posix_fallocate(descriptor, 0, SIZE)
        except OSError:
            descriptor = -1
    return mmap.mmap(descriptor, SIZE)


def set_note(note: mmap.mmap) -> None:
    """Makes `note` this process's; `reading` writes there from now on. Without it nothing is noted."""
    _kept[:] = [(note, [])]


def note_mapping(file: Path, size: int) -> None:
    """Notes that `file`, of `size` bytes, is read through a mapping from now on."""
    for note, files in _kept:
        files.append((str(file), size))
        text = json.dumps(files[-200:]).encode()[: SIZE - 1]
        note[: len(text) + 1] = text + b"\0"


def truncated_files(note: mmap.mmap) -> str:
    """The files in a dead process's note that have become smaller, as the end of a sentence about its death; "" for none."""
    text = note[:].partition(b"\0")[0]
    try:
        files = json.loads(text) if text else []
    except ValueError:  # it died while writing the note
        return ""
    now = {name: Path(name).stat().st_size if Path(name).is_file() else 0 for name, _ in files}
    found = [f"{name} had {size} bytes and now has {now[name]}" for name, size in files if now[name] < size]
    return f": {'; '.join(found)}" if found else ""
