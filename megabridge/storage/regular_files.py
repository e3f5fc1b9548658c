"""Safe opening of untrusted files: only regular ones are opened, no pipes, which block, and no devices. No torch."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from megabridge.errors import CheckpointError

LARGEST: Final = 1 << 30
"""Upper bound in bytes of a file that is read whole: config, index, manifest. A sparse file can be larger than memory."""
_KINDS: Final = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def expand(path: str | Path) -> Path:
    """Expands ~ in a user's path, which need not exist. Raises CheckpointError if it can't be looked up."""
    try:
        found = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.stat()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a cycle of links, a name too long, a NUL, no such home
        raise CheckpointError(f"{str(path)[:500]} can't be looked up ({reason(error)}); name another path.") from error
    return found


def kind(mode: int) -> str:
    """Describes an entry of a folder by its st_mode: "a file", "a link", "a pipe"."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def reason(error: Exception) -> str:
    """The reason of an error with a file, without the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")


def exists(path: Path) -> bool:
    """Whether `path` is a regular file or a link to one; False if that is unknown (a name too long, no permission)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder or a link to one; False if that is unknown."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def opened(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises CheckpointError if it is not a regular file or a link to one, or can't be opened."""
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
    """Reads the whole file. Raises CheckpointError as `opened` does, and for more than `largest` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise CheckpointError(f"{path} has {size} bytes, and may have {largest}; fetch it again.")
        try:
            return file.read(largest)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}; check the disk, or fetch it again.") from error


def read_text(path: Path) -> str:
    """Reads the whole file as UTF-8. Raises CheckpointError."""
    try:
        return read(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} must be UTF-8, and byte {error.start} is not; fetch it again.") from error
