"""Files that appear whole or not at all: what a full disk cuts off leaves the one before as it was. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What a write fails with on a full disk, or above a limit."""


def write(file: Path, content: str | bytes) -> None:
    """Writes `content` in the place of `file`. A link that bears its name is replaced, not followed. Raises OSError."""
    partial = file.with_name(f".{file.name}")
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()  # a link in a folder of others would lead out of it
        with partial.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())  # some file systems say only now that there is no room
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
