"""What srun starts once for each rank of a queued point, by way of slurm_script.HELD, which says the folder. No torch.

It starts the rank as a child and stays beside it: so it can say why a rank died that could not say so itself, and it
turns the queue's signals into a stop that is waited for. A SIGUSR1 or SIGTERM (time limit, preemption) reaches the rank
when its training loop takes signals, however early it came; SLURM may send it to the rank, too. A SIGTERM that srun
sends because another rank failed ends this rank at once: the other's outcome lies in the folder by then.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Final

from megabridge.errors import STOPPED_EXIT_CODE
from megabridge.launchers import local, place, processes, report, spec
from megabridge.launchers.place import Place
from megabridge.launchers.report import Failure

_POLL: Final = 0.05
_SETTLE: Final = 1.0
"""Seconds in which other ranks may leave their outcomes before srun hears of the first failure, and ends all."""


def main() -> int:
    """The task's exit status: 0 when the rank is done or was stopped after a save."""
    folder = Path(sys.argv[1])
    here = place.find(os.environ) or Place.all_on_this_host(1)[0]
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        values, platform = spec.read(folder, os.environ)
    except KeyError as error:
        outcome = Failure(here.rank, 1, f"{error.args[0]} is not in the job's environment; submit without --export=NONE.")
        spec.leave(folder, here.rank, outcome)
        return 1
    _continue(values)
    return _run(folder, here, values, platform, received)


def _continue(values: dict[str, Any]) -> None:
    """A run that was queued again goes on where it was saved. One that was told to start elsewhere does so only once."""
    checkpoints = Path(values["checkpoint"]["path"] or Path(values["run_dir"], "checkpoints"))
    if values["checkpoint"]["resume"] == "none" or any(checkpoints.glob("step_*")):
        values["checkpoint"]["resume"] = "auto"


def _run(folder: Path, here: Place, values: dict[str, Any], platform: str, received: list[int]) -> int:
    held = frozenset({signal.SIGUSR1, signal.SIGTERM})
    with local.started(values, [here], world_size=here.local_world_size, platform=platform, held=held) as workers:
        process = workers[0].process
        is_told = False
        while process.poll() is None:
            time.sleep(_POLL)
            if received and _another_failed(folder, here):
                processes.send(-process.pid, signal.SIGKILL)
                return 1
            if received and not is_told:
                is_told = True
                process.send_signal(signal.SIGUSR1)
        if process.returncode == STOPPED_EXIT_CODE:
            spec.leave(folder, here.rank, None)
            if here.rank == 0:
                (folder / spec.STOPPED).touch()
            return 0
        if process.returncode == 0:
            outcome = report.read(workers[0].outcome.fileno())
            spec.leave(folder, here.rank, outcome)
            return 0
        failure = local.first_failure(workers)
    # By this host's clock the times of several hosts can't be compared.
    spec.leave(folder, here.rank, Failure(**{**vars(failure), "time": time.time()}))
    print(f"megabridge: {failure.text()}", file=sys.stderr, flush=True)
    time.sleep(_SETTLE)
    return failure.status


def _another_failed(folder: Path, here: Place) -> bool:
    found = spec.outcomes(folder, here.world_size)
    return any(isinstance(outcome, Failure) for rank, outcome in found.items() if rank != here.rank)


if __name__ == "__main__":
    sys.exit(main())
