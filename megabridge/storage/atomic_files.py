"""Atomic file writes: a file is replaced completely or, as on a full disk, stays as it was. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Error numbers of writes to a full disk, or above a limit."""


def write(file: Path, content: str | bytes) -> None:
    """Replaces `file` by `content`. A link of that name is replaced, not followed. Raises OSError."""
    partial = file.with_name(f".{file.name}")
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()  # in someone else's folder it could be a link that leads out of it
        with partial.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())  # some file systems report only now that there is no room
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
