"""Starts the ranks of one run on this host and waits for them. No torch.

On a CPU one worker process imports the stack once and forks the ranks (16 in seconds, sharing their memory); on CUDA
each rank is a process of its own. Workers have process groups of their own, so that Ctrl-C reaches only this process,
which ends them. They get the config through an unnamed file in memory, so that secrets in it are never on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from types import FrameType
from typing import Any, Final

from megabridge.config.redaction import CARRIED
from megabridge.launchers import resuming
from megabridge.launchers.processes import children, ending
from megabridge.launchers.processes.children import Child
from megabridge.launchers.processes.outcome import Failure, Terminated, WorkerFailure
from megabridge.launchers.rank_environment import RankEnvironment
from megabridge.parallel.hardware import cores
from megabridge.storage.stop_page import StopPage

WORKER: Final = "megabridge.worker"
_GRACE: Final = 4.0  # seconds between SIGTERM and SIGKILL, and again for processes that the workers left behind
_SETTLE: Final = 0.3  # seconds to notice a killed rank after another rank has reported its lost connection


def launch(
    values: Mapping[str, Any],
    *,
    world_size: int,
    platform: str,
    pass_fds: Sequence[int] = (),
    overrides: Sequence[str] | None = None,
) -> float | None:
    """Runs the recipe of the resolved config `values` on `world_size` ranks; returns rank 0's objective.

    The ranks inherit the descriptors `pass_fds`. The first SIGINT or SIGTERM has ranks that train end their step, save and stop: a
    WorkerFailure whose failure `is_stop`. Raises WorkerFailure, too, with the first failure of a rank once the others have ended,
    and KeyboardInterrupt or Terminated after ending them on a second signal, or on one that comes while they don't train. With the
    command's `overrides` the message of an early end closes with the last save and the command that goes on from it. No process is
    left behind.
    """
    places = [None] if platform == "cpu" else RankEnvironment.all_on_this_host(world_size)
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(contextlib.closing(StopPage.new()))
        if overrides is not None:
            stack.enter_context(resuming.told(values, overrides, page))
        stack.enter_context(_stoppable(page))
        ranks = started(values, places, world_size=world_size, platform=platform, pass_fds=pass_fds, page=page)
        found = children.wait(stack.enter_context(ranks), settle=_SETTLE)
        page.is_training = False  # a signal from now on is for this process
        if isinstance(found, Failure):
            raise WorkerFailure(replace(found, rank=-1, error="") if found.is_stop else found)
        return found.objective


@contextlib.contextmanager
def started(
    values: Mapping[str, Any],
    environments: Sequence[RankEnvironment | None],
    *,
    world_size: int,
    platform: str,
    digest: str | None = None,
    blocked: Set[signal.Signals] = frozenset(),
    pass_fds: Sequence[int] = (),
    page: StopPage,
) -> Iterator[list[Child]]:
    """Starts the ranks of `environments` among this host's `world_size`, or with [None] the process that forks them all.

    Ends them with the block. `digest` is that of a config that other ranks have composed too (megabridge.worker). Signals in
    `blocked` are pending until the rank unblocks them (training.stopping); such a rank is ended by SIGKILL alone. All inherit the
    descriptors `pass_fds`, and share `page`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    workers: list[Child] = []
    environ = worker_environ(values, world_size=world_size, platform=platform)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ending.no_orphans(_GRACE))
        stack.callback(children.end, workers, 0.0 if blocked else _GRACE)
        common = [f"--stop={page.descriptor}", *([] if digest is None else [f"--digest={digest}"])]
        config = stack.enter_context(config_file(values))
        for place in environments:
            rank, own = (-1, {}) if place is None else (place.rank, place.environ())
            arguments = [*([f"--fork={world_size}"] if place is None else []), *common]
            child = children.spawn(
                WORKER,
                arguments,
                rank=rank,
                environ=environ | own,
                config=config,
                blocked=blocked,
                pass_fds=[*pass_fds, page.descriptor],
            )
            workers.append(child)
        yield workers


@contextlib.contextmanager
def config_file(values: Mapping[str, Any]) -> Iterator[int]:
    """Yields the descriptor of an unnamed file with the config, for workers to inherit."""
    descriptor = children.unnamed()
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(json.dumps(values).encode())
        yield descriptor
    finally:
        os.close(descriptor)


def worker_environ(values: Mapping[str, Any], *, world_size: int, platform: str) -> dict[str, str]:
    """Returns the environment of a worker on a host that runs `world_size` ranks."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(CARRIED)}
    environ["MEGABRIDGE_PLATFORM"] = platform
    environ.setdefault("OMP_NUM_THREADS", str(threads_each(world_size)))
    # The tokenizer's threads don't survive the fork, and each rank has a process of its own anyway.
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if values["deterministic"]:
        environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return environ


def threads_each(world_size: int) -> int:
    """Number of threads of each rank, so that all ranks together use every core once."""
    return max(1, cores() // world_size)


@contextlib.contextmanager
def _stoppable(page: StopPage) -> Iterator[None]:
    """The first SIGINT or SIGTERM inside asks ranks that train to stop; any other raises KeyboardInterrupt or Terminated.

    In other threads signals stay as they are, and SIGINT where it is ignored, as in the background of a shell.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if page.is_asked or not page.is_training:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        page.ask()
        print("megabridge: stopping: the step in hand ends and is saved; once more ends at once.", file=sys.stderr, flush=True)

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside, as Ctrl-C raises KeyboardInterrupt. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
