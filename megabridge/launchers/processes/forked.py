"""Forks ranks from one process that has imported the stack. No torch here.

Sixteen ranks that import torch, transformers and megatron-core themselves take a minute and 8 GB; forked they take seconds and
share memory. A fork copies only the calling thread, so the parent must fork before torch has started threads: it imports and
computes nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from megabridge.errors import ConfigError
from megabridge.launchers.processes import children
from megabridge.launchers.processes.children import Child
from megabridge.launchers.processes.outcome import Outcome

_GRACE: Final = 2.0  # seconds between SIGTERM and SIGKILL


def fork_ranks(world_size: int, target: Callable[[int, socket.socket], float | None], *, timeout: float | None = None) -> Outcome:
    """Runs `target(rank, listener)` in `world_size` forked processes; returns rank 0's report, or the first failure.

    The ranks find RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment. `listener` is
    bound to that port before the fork, so that no other process can take it; it is for rank 0's store. On the first failure (or
    after `timeout` seconds) the other ranks and everything they started are ended within seconds. If this process dies, its ranks
    die with it; on KeyboardInterrupt they are ended and it is raised again.

    Raises ConfigError when this process runs Python threads: a fork would not copy them.
    """
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise ConfigError(f"fork_ranks needs a process with one thread, but {names} run; fork before starting them.")
    ranks: list[Child] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(max(128, world_size))

        def work(rank: int) -> float | None:
            os.environ |= _environ(rank, world_size, listener)
            return target(rank, listener)

        try:
            for rank in range(world_size):
                ranks.append(children.fork(rank, lambda rank=rank: work(rank)))  # type: ignore[misc]
            return children.wait(ranks, until=None if timeout is None else time.monotonic() + timeout)
        finally:
            children.end(ranks, _GRACE)


def _environ(rank: int, world_size: int, listener: socket.socket) -> dict[str, str]:
    address, port = listener.getsockname()
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",  # the host's name may resolve to an address that doesn't answer
    }
