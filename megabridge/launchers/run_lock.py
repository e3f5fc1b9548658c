"""A directory that one command writes at a time: claimed before anything in it changes, until its last process has ended. No torch.

The parent of rank 0 claims a run's, on whichever host it is, and rank 0 inherits the lock: it lasts while either lives.
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
"""It stays when the run has ended: one that nobody holds refuses nobody."""
_LEAVING: Final = 2.0
"""Seconds that the ranks of a run that was killed may take to be gone."""
_POLL: Final = 0.1


@contextlib.contextmanager
def claimed(folder: Path, key: str = "run_dir") -> Iterator[int]:
    """Holds `folder`, which is made where it is missing; the descriptor is for children to inherit (`kept`).

    Raises ConfigError, which names the setting `key`, where another run has it, and where it can't be made or written.
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
    """As `claimed`, until the descriptor is closed by all who have it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
    except (OSError, ValueError) as error:
        raise unusable(folder, key, error) from error
    try:
        _lock(descriptor, f"{key}={folder}")
        with contextlib.suppress(OSError):  # the holder's name is for people
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
    """What is to be said of a directory in which a file can't be written."""
    return ConfigError(
        f"{key}={folder} must be a folder that can be made and written, but: {regular_files.reason(error)}; set another."
    )


def _lock(descriptor: int, what: str) -> None:
    """Raises BlockingIOError where another has it and keeps it."""
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
