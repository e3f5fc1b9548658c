"""Lock of a run or sweep directory, so that one command at a time writes it, until its last process has ended. No torch.

The parent of rank 0 takes the lock of a run, on whichever host it is, and rank 0 inherits it: it lasts while either lives.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from megabridge.errors import ConfigError, plain
from megabridge.storage import locks, regular_files

LOCK: Final = ".run.lock"
"""The lock file. It stays when the run has ended; only the lock on it counts."""
_LEAVING: Final = 2.0
"""Seconds that the ranks of a killed run may take to end."""
_POLL: Final = 0.1


@contextlib.contextmanager
def claimed(folder: Path, key: str = "run_dir") -> Iterator[int]:
    """Locks `folder`, which is created if missing; yields the descriptor, for children to inherit (`pass_fds`).

    Raises ConfigError, which names the setting `key`, where another run holds the lock, or the folder can't be written.
    """
    descriptor = take(folder, key)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check(folder: Path, key: str = "run_dir") -> None:
    """Raises ConfigError where another run has `folder`; makes nothing."""
    if regular_files.exists(folder / LOCK):
        os.close(take(folder, key))


def take(folder: Path, key: str = "run_dir") -> int:
    """Locks as `claimed` does, until all processes that have the descriptor have closed it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
    except (OSError, ValueError) as error:
        raise unusable(folder, key, error) from error
    try:
        _lock(descriptor, f"{key}={folder}")
        with contextlib.suppress(OSError):  # the holder's name is only for messages
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise ConfigError(
            f"{key}={folder} is in use by another run{f' ({holder})' if holder else ''}; wait for it to end, or give this one its "
            f"own {key}."
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise unusable(folder, key, error) from error
    return descriptor


def unusable(folder: Path, key: str, error: Exception) -> ConfigError:
    """Makes the error for a directory in which a file can't be written."""
    return ConfigError(
        f"{key}={folder} must be a folder that can be made and written, but: {regular_files.reason(error)}; set another."
    )


def _lock(descriptor: int, what: str) -> None:
    """Takes the lock. Raises BlockingIOError where another process holds it and doesn't end."""
    until = time.monotonic() + _LEAVING
    while True:
        try:
            return locks.take(descriptor, locks.EXCLUSIVE, what)
        except BlockingIOError:
            if time.monotonic() > until or _is_alive(_holder(descriptor)):
                raise
        time.sleep(_POLL)


def _holder(descriptor: int) -> str:
    return plain(os.pread(descriptor, 300, 0).decode(errors="replace")).strip()


def _is_alive(holder: str) -> bool:
    """Whether the process that wrote its name into the lock is one of this host that runs: its ranks don't leave then."""
    found = re.fullmatch(r"process (\d+) on (.*)", holder)
    return found is not None and found[2] == socket.gethostname() and Path("/proc", found[1]).exists()
