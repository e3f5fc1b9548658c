"""Starts the ranks of one run on this host and waits for them. No torch.

On a CPU one worker process imports the stack once and forks the ranks (16 in seconds, sharing their memory); on CUDA
each rank is a process of its own. The workers stand in process groups of their own, so that Ctrl-C reaches only this
process, which ends them. They get the config through an unnamed file: a secret in it never has a name on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Final

from megabridge import last_words
from megabridge.host import cores
from megabridge.launchers import processes, report
from megabridge.launchers.place import Place
from megabridge.launchers.report import Failure, WorkerFailure
from megabridge.redact import CARRIED

_GRACE: Final = 4.0  # seconds between SIGTERM and SIGKILL, and again for what the workers left behind
_SETTLE: Final = 0.3  # seconds in which a rank that was killed is noticed beside the one that lost its connection to it
_POLL: Final = 0.02


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass
class Worker:
    rank: int
    """Its rank, or -1 for the process that forks all of them."""
    process: subprocess.Popen[bytes]
    outcome: IO[bytes]
    """The unnamed file in which it leaves its outcome."""
    note: IO[bytes]
    """The unnamed file in which it notes what it reads."""


def launch(values: Mapping[str, Any], *, world_size: int, platform: str) -> float | None:
    """Runs the recipe of the resolved config `values` on `world_size` ranks; returns rank 0's objective.

    Raises WorkerFailure with the first failure of a rank when the others have ended, and KeyboardInterrupt or
    Terminated after ending them on SIGINT or SIGTERM. No process is left behind.
    """
    places = [None] if platform == "cpu" else Place.all_on_this_host(world_size)
    with terminable(), started(values, places, world_size=world_size, platform=platform) as workers:
        return _wait(workers)


@contextlib.contextmanager
def started(
    values: Mapping[str, Any],
    places: Sequence[Place | None],
    *,
    world_size: int,
    platform: str,
    held: Set[signal.Signals] = frozenset(),
) -> Iterator[list[Worker]]:
    """The ranks at `places` of this host's `world_size`, or with [None] the process that forks them all; ended with the block.

    Signals in `held` wait until the rank takes them (training.stopping).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    workers: list[Worker] = []
    environ = worker_environ(values, world_size=world_size, platform=platform)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.no_orphans(_GRACE))
        stack.callback(_end, workers)
        config = stack.enter_context(config_file(values))
        for place in places:
            outcome = stack.enter_context(tempfile.TemporaryFile())
            note = stack.enter_context(tempfile.TemporaryFile())
            workers.append(_start(place, world_size, config, outcome, note, environ, held))
        yield workers


@contextlib.contextmanager
def config_file(values: Mapping[str, Any]) -> Iterator[int]:
    """The descriptor of an unnamed file with the config, for workers to inherit."""
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(values).encode())
        file.flush()
        yield file.fileno()


def worker_environ(values: Mapping[str, Any], *, world_size: int, platform: str) -> dict[str, str]:
    """The environment of a worker on a host that runs `world_size` of them."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(CARRIED)}
    environ["MEGABRIDGE_PLATFORM"] = platform
    environ.setdefault("OMP_NUM_THREADS", str(threads_each(world_size)))
    # Its threads don't survive the fork, and each rank has its own process anyway.
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if values["deterministic"]:
        environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return environ


def threads_each(world_size: int) -> int:
    """Threads of one rank, so that all together use the cores once."""
    return max(1, cores() // world_size)


def _start(
    place: Place | None,
    world_size: int,
    config: int,
    outcome: IO[bytes],
    note: IO[bytes],
    environ: dict[str, str],
    held: Set[signal.Signals],
) -> Worker:
    """Starts the rank at `place`, or with None the process that forks all ranks."""
    arguments = [f"--config={config}", f"--outcome={outcome.fileno()}", f"--note={note.fileno()}"]
    if place is None:
        arguments.append(f"--fork={world_size}")
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        processes.die_with_parent(parent)

    process = subprocess.Popen(
        [sys.executable, "-m", "megabridge.worker", *arguments],
        env=environ | ({} if place is None else place.environ()),
        stdin=subprocess.DEVNULL,
        pass_fds=(config, outcome.fileno(), note.fileno()),
        process_group=0,
        preexec_fn=prepare,
    )
    return Worker(-1 if place is None else place.rank, process, outcome, note)


def _wait(workers: list[Worker]) -> float | None:
    """Waits until all workers have ended well, or one has not; returns rank 0's objective."""
    running = list(workers)
    while running:
        time.sleep(_POLL)
        ended = [worker for worker in running if worker.process.poll() is not None]
        if any(worker.process.returncode for worker in ended):
            time.sleep(_SETTLE)
            raise WorkerFailure(first_failure([worker for worker in workers if worker.process.poll()]))
        running = [worker for worker in running if worker not in ended]
    outcome = report.read(workers[0].outcome.fileno())
    return None if isinstance(outcome, Failure) else outcome


def first_failure(failed: list[Worker]) -> Failure:
    """The cause among the workers that failed (report.first)."""
    known = []
    for worker in failed:
        outcome = report.read(worker.outcome.fileno())
        killed = Failure(worker.rank, worker.process.returncode, _cause_of_death(worker))
        known.append(outcome if isinstance(outcome, Failure) else killed)
    return report.first(known)


def _cause_of_death(worker: Worker) -> str:
    """What to say of a process that left no report."""
    exit_code: int = worker.process.returncode
    if exit_code >= 0:
        return f"ended with exit code {exit_code} and without a report; its own output may say why."
    name = signal.Signals(-exit_code).name
    files = last_words.truncated(last_words.page(worker.note.fileno())) if name == "SIGBUS" else ""
    hints = {"SIGKILL": " (out of memory, or killed from outside)", "SIGBUS": f" (a file that it read was truncated){files}"}
    return f"was ended by {name}{hints.get(name, '')}."


def _end(workers: list[Worker]) -> None:
    processes.end_groups([worker.process.pid for worker in workers if worker.process.poll() is None], _GRACE)
    for worker in workers:
        worker.process.wait()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside, as Ctrl-C KeyboardInterrupt. In other threads signals stay as they are."""
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
