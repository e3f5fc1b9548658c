"""Locks that end with the last process that has the file open: stale ones vanish by themselves. No torch."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from typing import Final

EXCLUSIVE: Final = fcntl.LOCK_EX
SHARED: Final = fcntl.LOCK_SH
_UNKNOWN: Final = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))
"""What a file system answers that has no such locks: NFS without its lock service, Lustre mounted without them."""
_said: Final[set[int]] = set()
"""The devices of those of which this process has said so."""


def take(descriptor: int, kind: int, what: str) -> None:
    """Locks an open file without waiting. Children that inherit the descriptor hold the lock, too.

    Where its file system has no locks, that is said of `what` once, and nothing is locked. Raises BlockingIOError where another
    holds it, else OSError.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _said:
            _said.add(device)
            text = f"{what} is on a file system without locks ({error.strerror}); see to it that nothing else writes there"
            print(f"megabridge: {text}", file=sys.stderr, flush=True)
