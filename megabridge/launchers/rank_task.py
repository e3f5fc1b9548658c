"""Supervisor of one rank: the process that torchrun or srun starts, which runs the rank as its child. No torch.

It can say why a rank died that could not report it, takes a rank that vanishes as failed, and forwards a stop signal and waits for
the rank to end. The rank of a queued point is started by slurm_script.RANK_TASK with the point's folder, in which it leaves its
outcome; any other by megabridge.run (`supervise`).

A SIGUSR1 or SIGTERM of the queue (time limit, preemption) reaches a queued point's rank when its training loop unblocks signals,
however early it came; SLURM may send it to the rank as well. A SIGTERM that srun sends because another rank failed ends this rank
at once: by then the other's outcome is in the folder. Outside a queue a signal that comes while the rank is not training, and a
second signal, end it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

from megabridge.errors import MegabridgeError
from megabridge.launchers import job_files, local, rank_environment, resuming, run_lock
from megabridge.launchers.processes import children, standard_streams
from megabridge.launchers.processes.children import Child
from megabridge.launchers.processes.ending import send
from megabridge.launchers.processes.outcome import Done, Failure, Outcome
from megabridge.launchers.rank_environment import RankEnvironment
from megabridge.storage import steps
from megabridge.storage.stop_page import StopPage

_POLL: Final = 0.05
_SETTLE: Final = 1.0
"""Seconds in which other ranks can leave their outcomes before srun notices the first failure, and ends all."""
_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGUSR1})


def main() -> int:
    """Runs the rank of a queued point; returns the exit status, 0 when the rank is done or was stopped after a save."""
    standard_streams.settle()
    folder = Path(sys.argv[1])
    here = rank_environment.find(os.environ) or RankEnvironment.all_on_this_host(1)[0]
    received = _received(*_SIGNALS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        with contextlib.ExitStack() as stack:
            values, platform = job_files.read(folder, os.environ)
            pass_fds = [stack.enter_context(run_lock.claimed(Path(values["run_dir"])))] if here.rank == 0 else []
            _continue(values)
            page = stack.enter_context(contextlib.closing(StopPage.new()))
            count = here.local_world_size
            ranks = local.started(
                values, [here], world_size=count, platform=platform, blocked=_SIGNALS, pass_fds=pass_fds, page=page
            )
            found = _wait(stack.enter_context(ranks)[0], received, lambda _: _another_failed(folder, here))
    except MegabridgeError as error:  # it could not be started
        found = Failure.of(error, here.rank)
    return 1 if found is None else _left(folder, here, found)


def supervise(
    values: Mapping[str, Any],
    here: RankEnvironment,
    *,
    digest: str,
    pass_fds: Sequence[int] = (),
    overrides: Sequence[str] | None = None,
) -> int:
    """Starts the rank `here` of torchrun or srun as a child and waits for it; returns the exit status of this process.

    The rank inherits the descriptors `pass_fds`. Where it ends early, each host's first rank says how the run is continued, by the
    command's `overrides`.
    """
    received = _received(*_SIGNALS, signal.SIGINT)
    count, platform = here.local_world_size, values["platform"]
    page = StopPage.new()
    ranks = local.started(
        values, [here], world_size=count, platform=platform, digest=digest, blocked=_SIGNALS, pass_fds=pass_fds, page=page
    )
    with contextlib.closing(page), ranks as workers:
        rank = workers[0]
        found = _wait(rank, received, lambda is_told: len(received) > 1 if is_told else not _takes_signals(rank))
        if found is not None and not isinstance(found, Done):
            _show(found)
        if overrides is not None and here.local_rank == 0 and not isinstance(found, Done):
            resuming.say(resuming.hint(values, overrides, page, found))
    if found is None:
        return 128 + received[-1]
    return found.status if isinstance(found, Failure) else 0


def _received(*numbers: int) -> list[int]:
    """The signals of these `numbers` that arrive from now on, oldest first."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in numbers:
        signal.signal(number, receive)
    return received


def _wait(rank: Child, received: list[int], gives_up: Callable[[bool], bool]) -> Outcome | None:
    """Waits for the rank and forwards the first signal to it; returns how it ended.

    Kills it and returns None once `gives_up` is true, which is called while there are signals with whether one was forwarded.
    """
    is_told = False
    while not children.ended([rank], _POLL):
        if received and gives_up(is_told):
            send(-rank.pid, signal.SIGKILL)
            return None
        if received and not is_told:
            is_told = True
            send(rank.pid, signal.SIGUSR1)
    return rank.ended_with()


def _takes_signals(rank: Child) -> bool:
    """Whether its training loop has unblocked the signals (training.stopping)."""
    blocked = Path(f"/proc/{rank.pid}/status").read_text().partition("SigBlk:")[2].split()
    return not int(blocked[0], 16) >> (signal.SIGTERM - 1) & 1


def _continue(values: dict[str, Any]) -> None:
    """Makes a requeued run resume from its last save; another checkpoint.resume holds for the first start only."""
    checkpoint = values["checkpoint"]
    places = steps.places(Path(values["run_dir"]), checkpoint["path"], checkpoint.get("spare_path"))
    if checkpoint["resume"] == "none" or any(any(place.glob("step_*")) for place in places):
        checkpoint["resume"] = "auto"


def _left(folder: Path, here: RankEnvironment, found: Outcome) -> int:
    """Leaves the outcome in the point's folder, and shows a failure; returns the exit status."""
    is_stopped = isinstance(found, Failure) and found.is_stop
    if is_stopped:
        found = Done()
    if isinstance(found, Failure):  # wall-clock time, to compare failures of several hosts
        found = replace(found, time=time.time())
        _show(found)
    try:
        job_files.leave(folder, here.rank, found)
        if is_stopped and here.rank == 0:
            (folder / job_files.STOPPED).touch()
    except OSError as error:
        text = f"{folder} can't take the rank's outcome: {error.strerror}; check its file system."
        _show(Failure(here.rank, 1, text, is_expected=True))
        return 1
    if isinstance(found, Done):
        return 0
    time.sleep(_SETTLE)
    return found.status


def _show(failure: Failure) -> None:
    if failure.error and not failure.is_stop:
        print(f"megabridge: {failure.text()}", file=sys.stderr, flush=True)


def _another_failed(folder: Path, here: RankEnvironment) -> bool:
    found = job_files.outcomes(folder, here.world_size)
    return any(isinstance(outcome, Failure) for rank, outcome in found.items() if rank != here.rank)


if __name__ == "__main__":
    sys.exit(main())
