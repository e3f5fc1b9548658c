"""`hydra/launcher=local`: the points of a sweep on this host, one after another or several at once. No torch.

Each point has a process of its own, forked from this one, which starts the point's ranks as a single run does
(megabridge.launchers.local). Points that run at once share neither GPUs nor, as far as there are enough, cores.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, NoReturn

from megabridge import host
from megabridge.errors import ConfigError
from megabridge.launchers import local, processes, report
from megabridge.launchers.report import Failure, WorkerFailure
from megabridge.launchers.settings import LocalSettings
from megabridge.launchers.sweep import RUNNING, Job

OUTPUT: Final = "output.log"
"""What a point printed that ran beside others, in its run directory."""
_POLL: Final = 0.02
_GRACE: Final = 10.0  # seconds for a point's process to end its ranks, which takes up to twice local's own grace


def runner(settings: LocalSettings) -> LocalRunner:
    """What runs points with `settings`. Raises ConfigError for a number of points that can't be."""
    if settings.at_once is not None and settings.at_once < 1:
        raise ConfigError(f"hydra.launcher.at_once={settings.at_once} must be at least 1, or null for as many as fit.")
    return LocalRunner(settings)


@dataclass
class _Running:
    job: Job
    pid: int
    outcome: IO[bytes]
    gpus: list[str]
    cores: list[int]


@dataclass
class LocalRunner:
    """Runs points on this host's GPUs or cores."""

    settings: LocalSettings
    _running: list[_Running] = field(default_factory=list)

    def check(self, job: Job) -> None:
        """As a single run on this host is checked."""
        found = host.visible_gpus(), host.memory_bytes()
        job.platform = host.choose_platform(job.config, job.topology, gpus=found[0], memory=found[1], overrides=job.point.overrides)

    def run(self, jobs: Sequence[Job], folder: Path, save: Callable[[], None]) -> None:
        """Returns when all have ended. On Ctrl-C and SIGTERM the running ones are ended first."""
        at_once = _at_once(self.settings.at_once, jobs)
        gpus, cores = _gpus(), sorted(os.sched_getaffinity(0))
        every, share = list(cores), max(1, len(cores) // at_once)
        waiting = list(jobs)
        with local.terminable(), contextlib.ExitStack() as stack:
            stack.callback(self._end)
            while waiting or self._running:
                while waiting and len(self._running) < at_once and _needed(waiting[0]) <= len(gpus):
                    job = waiting.pop(0)
                    mine, gpus = gpus[: _needed(job)], gpus[_needed(job) :]
                    own, cores = cores[:share], cores[share:]
                    self._running.append(_start(job, mine, own or every, alone=at_once == 1))
                time.sleep(_POLL)
                for ended, status in _ended(self._running):
                    self._running.remove(ended)
                    gpus += ended.gpus
                    cores += [core for core in ended.cores if core not in cores][:share]
                    with ended.outcome:
                        died = Failure(-1, status, f"the process that starts its ranks ended with {status}.")
                        ended.job.point.finish(died if status else report.read(ended.outcome.fileno()))
                    save()

    def _end(self) -> None:
        processes.end_groups([each.pid for each in self._running], _GRACE)
        for each in self._running:
            os.waitpid(each.pid, 0)


def _ended(running: list[_Running]) -> list[tuple[_Running, int]]:
    """Those that have ended, reaped, with their exit codes as in subprocess."""
    states = [(each, os.waitpid(each.pid, os.WNOHANG)) for each in running]
    return [(each, os.waitstatus_to_exitcode(status)) for each, (pid, status) in states if pid]


def _needed(job: Job) -> int:
    return job.topology.world_size if job.platform == "cuda" else 0


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold in this process's children."""
    count = host.visible_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",")[:count] if chosen else [str(number) for number in range(count)]


def _at_once(wanted: int | None, jobs: Sequence[Job]) -> int:
    """How many points run at the same time."""
    if wanted is not None:
        return max(1, min(wanted, len(jobs)))
    largest = max((job.topology.world_size for job in jobs), default=1)
    room = host.visible_gpus() if any(job.platform == "cuda" for job in jobs) else host.cores()
    return max(1, min(len(jobs), room // largest))


def _start(job: Job, gpus: list[str], cores: list[int], *, alone: bool) -> _Running:
    """Forks the process that runs `job`."""
    outcome = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the outcome was read
    output = Path(job.values["run_dir"], OUTPUT)
    print(f"{job.point.title} starts{'' if alone else f'; it prints to {output}'}", flush=True)
    job.point.state = RUNNING
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(job, parent, outcome, gpus, cores, None if alone else output)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so, or has ended
        os.setpgid(pid, pid)
    return _Running(job, pid, outcome, gpus, cores)


def _become(job: Job, parent: int, outcome: IO[bytes], gpus: list[str], cores: list[int], output: Path | None) -> NoReturn:
    """The forked process: runs `job` and ends. What its parent was in the middle of is not its business."""
    status = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C reaches only the parent, which ends this process
        processes.die_with_parent(parent)
        os.sched_setaffinity(0, cores)
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if output is not None:
            with output.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        report.write(outcome.fileno(), _outcome(job))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _outcome(job: Job) -> Failure | float | None:
    """Runs the point in this process's children."""
    try:
        return local.launch(job.values, world_size=job.topology.world_size, platform=job.platform)
    except WorkerFailure as failed:
        return failed.failure
    except (local.Terminated, KeyboardInterrupt):
        return Failure(-1, -signal.SIGTERM, "was ended.")
    except Exception as error:
        return Failure(-1, 1, f"{type(error).__name__}: {error}", traceback.format_exc())
