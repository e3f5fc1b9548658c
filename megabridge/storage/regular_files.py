"""Files that others may have made: only regular ones are opened, no pipe that waits for ever, no endless device. No torch."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from megabridge.errors import CheckpointError

LARGEST: Final = 1 << 30
"""Bytes of a file that is read as a whole: config, index, manifest. A sparse file can say that it has more than there is memory."""
_KINDS: Final = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def place(path: str | Path) -> Path:
    """What a user's path means, ~ expanded; there may be nothing. Raises CheckpointError where that can't even be looked up."""
    try:
        found = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.stat()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a circle of links, a name too long, a NUL, no such home
        raise CheckpointError(f"{str(path)[:500]} can't be looked up ({reason(error)}); name another path.") from error
    return found


def kind(mode: int) -> str:
    """What an entry of a folder is, by its st_mode: "a file", "a link", "a pipe"."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def reason(error: Exception) -> str:
    """Why a file can't be used, without its name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")


def exists(path: Path) -> bool:
    """Whether there is a regular file, or a link to one; False also where that can't be known (a name too long, no permission)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or a link to one; False also where that can't be known."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def opened(path: Path) -> BinaryIO:
    """The file, open for reading. Raises CheckpointError where it is no regular file, or links to none, or can't be opened."""
    try:
        # Without O_NONBLOCK a pipe waits for its other end, and some devices for a carrier.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)[:500]} can't be read: {reason(error)}; fetch it again, or name another.") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} must be a regular file, not {kind(mode)}; fetch it again.")
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read(path: Path, *, largest: int = LARGEST) -> bytes:
    """All of the file. Raises CheckpointError as `opened` does, and for more than `largest` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise CheckpointError(f"{path} has {size} bytes, and may have {largest}; fetch it again.")
        try:
            return file.read(largest)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}; look after the disk, or fetch it again.") from error


def read_text(path: Path) -> str:
    """All of the file, which must be UTF-8. Raises CheckpointError."""
    try:
        return read(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} must be UTF-8, and byte {error.start} is not; fetch it again.") from error
