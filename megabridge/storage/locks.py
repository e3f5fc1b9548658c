"""File locks (flock), which end with the last process that has the file open, so that none is stale. No torch."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from typing import Final

EXCLUSIVE: Final = fcntl.LOCK_EX
SHARED: Final = fcntl.LOCK_SH
_UNKNOWN: Final = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))
"""Error numbers of file systems without such locks: NFS without its lock service, Lustre mounted without flock."""
_said: Final[set[int]] = set()
"""Devices without locks that this process has warned about."""


def take(descriptor: int, kind: int, what: str) -> None:
    """Locks an open file without waiting. Children that inherit the descriptor hold the lock too.

    If the file system has no locks, a warning about `what` is printed once, and nothing is locked. Raises BlockingIOError if
    another process holds the lock, OSError for other errors.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _said:
            _said.add(device)
            text = f"{what} is on a file system without locks ({error.strerror}); make sure that nothing else writes there"
            print(f"megabridge: {text}", file=sys.stderr, flush=True)
