"""`hydra/launcher=local`: the points of a sweep on this host, one after another or several at once. No torch.

Each point has a process of its own, forked from this one, which starts the point's ranks as a single run does
(megabridge.launchers.local). Points that run at once share neither GPUs nor, as far as there are enough, cores.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.launchers import chosen_layout, local, preflight, run_lock
from megabridge.launchers.platform_choice import choose_platform
from megabridge.launchers.processes import children
from megabridge.launchers.processes.children import Child
from megabridge.launchers.processes.outcome import Failure
from megabridge.launchers.settings import LocalSettings
from megabridge.launchers.sweep import RUNNING, SweepJob
from megabridge.layouts.devices import Machine
from megabridge.parallel import hardware

OUTPUT: Final = "output.log"
"""The output of a point that ran beside others, in its run directory."""
_POLL: Final = 0.02
_GRACE: Final = 10.0  # seconds for a point's process to end its ranks, which takes up to twice local's own grace
_STOPPING: Final = 600.0  # seconds for points that are told to stop: they end a step and save


def runner(settings: LocalSettings) -> LocalRunner:
    """Returns a runner with `settings`. Raises ConfigError for an impossible number of concurrent points."""
    if settings.at_once is not None and settings.at_once < 1:
        raise ConfigError(f"hydra.launcher.at_once={settings.at_once} must be at least 1, or null for as many as fit.")
    return LocalRunner(settings)


@dataclass
class _Running:
    job: SweepJob
    child: Child
    gpus: list[str]
    cores: list[int]


@dataclass
class LocalRunner:
    """Runs points on this host's GPUs or cores."""

    settings: LocalSettings
    _running: list[_Running] = field(default_factory=list)

    def machine(self, config: Config) -> Machine:
        """Returns the devices of this host, or those that `plan` names."""
        return chosen_layout.here(config)

    def check(self, job: SweepJob) -> None:
        """Chooses the platform as for a single run on this host."""
        found = hardware.visible_gpus(), hardware.memory_bytes()
        job.platform = choose_platform(job.config, job.topology, gpus=found[0], memory=found[1], overrides=job.point.overrides)
        preflight.check(job.config, platform=job.platform)

    def run(self, jobs: Sequence[SweepJob], folder: Path, save: Callable[[], None]) -> None:
        """Runs all jobs and returns when they have ended. On Ctrl-C and SIGTERM the running ones are ended first."""
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
                for ended in [each for each in self._running if each.child.has_ended()]:
                    self._running.remove(ended)
                    gpus += ended.gpus
                    cores += [core for core in ended.cores if core not in cores][:share]
                    children.end([ended.child], _GRACE)
                    ended.job.point.finish(ended.child.ended_with())
                    save()

    def _end(self) -> None:
        if self._running:
            print("the points that run end their step and save; once more ends them at once", flush=True)
        children.end([each.child for each in self._running], _STOPPING)
        for each in self._running:
            outcome = each.child.ended_with()
            if isinstance(outcome, Failure) and outcome.is_stop:
                each.job.point.finish(outcome)


def _needed(job: SweepJob) -> int:
    return job.topology.world_size if job.platform == "cuda" else 0


def _gpus() -> list[str]:
    """Values for CUDA_VISIBLE_DEVICES of this process's children, one per GPU."""
    count = hardware.visible_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",")[:count] if chosen else [str(number) for number in range(count)]


def _at_once(wanted: int | None, jobs: Sequence[SweepJob]) -> int:
    """Number of points that run at the same time."""
    if wanted is not None:
        return max(1, min(wanted, len(jobs)))
    largest = max((job.topology.world_size for job in jobs), default=1)
    room = hardware.visible_gpus() if any(job.platform == "cuda" for job in jobs) else hardware.cores()
    return max(1, min(len(jobs), room // largest))


def _start(job: SweepJob, gpus: list[str], cores: list[int], *, alone: bool) -> _Running:
    """Forks the process that runs `job`."""
    output = Path(job.values["run_dir"], OUTPUT)
    print(f"{job.point.title} starts{'' if alone else f'; it prints to {output}'}", flush=True)
    job.point.state = RUNNING

    typed = [*job.point.overrides]

    def work() -> float | None:
        os.sched_setaffinity(0, cores)
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with run_lock.claimed(output.parent) as lock:
            if not alone:
                _print_to(output)
            return local.launch(
                job.values, world_size=job.topology.world_size, platform=job.platform, pass_fds=(lock,), overrides=typed
            )

    return _Running(job, children.fork(-1, work), gpus, cores)


def _print_to(output: Path) -> None:
    """Redirects the output of this process and its children to a file. Raises ConfigError."""
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise run_lock.unusable(output.parent, "run_dir", error) from error
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
