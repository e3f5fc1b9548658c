"""Ends child processes with their parent: parent-death signal, subreaper, signals to process groups. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER: Final = 36
_POLL: Final = 0.02


def die_with_parent(parent: int) -> None:
    """Has Linux kill this process when `parent` ends in any way. For a child, right after its fork."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@contextlib.contextmanager
def no_orphans(grace: float) -> Iterator[None]:
    """Waits at the end of the block until all descendants that were started inside have ended.

    Descendants whose own parent ended become children of this process. They are killed: at once if the block raises,
    else after `grace` seconds, in which they can finish (an upload).
    """
    if sys.platform != "linux":
        yield
        return
    before = _children()
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    until = 0.0
    try:
        yield
        until = time.monotonic() + grace
    finally:
        while orphans := _children() - before:
            for pid in orphans:
                if time.monotonic() > until:
                    send(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(_POLL)
        prctl(_PR_SET_CHILD_SUBREAPER, 0)


def send(pid: int, number: signal.Signals) -> None:
    """Signals a process, or with a negative pid a process group, which may have ended already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if pid < 0:
            os.killpg(-pid, number)
        else:
            os.kill(pid, number)


def _children() -> set[int]:
    """Process ids of the children of all threads of this process."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found
