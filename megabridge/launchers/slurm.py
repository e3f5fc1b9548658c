"""`hydra/launcher=slurm`: submits the points of a sweep as job arrays, follows them, and collects results. No torch.

`slurm/` in the sweep's directory has a folder for each point (megabridge.launchers.job_files) and the scripts. Points of one
shape make one array. With max_concurrent, arrays of several shapes run one after another, so that the limit holds for all.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megabridge.errors import ConfigError
from megabridge.launchers import job_files, local, slurm_queue, sweep
from megabridge.launchers.processes.outcome import Failure, Outcome, first
from megabridge.launchers.settings import SlurmSettings
from megabridge.launchers.slurm_script import JobShape, hidden_environment, script
from megabridge.launchers.sweep import DONE, RUNNING, SUBMITTED, WAITING, SweepJob, SweepRun

QUEUE: Final = "slurm"
FETCH: Final = "recipes.fetch:main"
_ACTIVE: Final = ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT")
_WAITING: Final = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "RESIZING")
_LATE: Final = 30.0
"""Seconds for files that were written on a node to appear here after the job has left the queue."""


def runner(settings: SlurmSettings) -> SlurmRunner:
    """Returns a runner with `settings`. Raises ConfigError for settings that can't work."""
    if settings.max_concurrent is not None and settings.max_concurrent < 1:
        raise ConfigError(f"hydra.launcher.max_concurrent={settings.max_concurrent} must be at least 1, or null for no limit.")
    return SlurmRunner(settings)


@dataclass
class SlurmRunner:
    """Runs points as array jobs."""

    settings: SlurmSettings

    def check(self, job: SweepJob) -> None:
        """Chooses the platform: platform=auto means GPUs, whatever the submitting host has."""
        job.platform = "cpu" if job.config.platform == "cpu" else "cuda"
        _shape(job, self.settings)

    def run(self, jobs: Sequence[SweepJob], folder: Path, save: Callable[[], None]) -> None:
        """Submits all jobs; returns at once with `detach`, else when all have ended. Ctrl-C and SIGTERM cancel them."""
        queue = folder / QUEUE
        scripts = self._scripts(jobs, queue)
        if self.settings.dry_run:
            for name, (text, _) in scripts.items():
                print(f"# {queue / name}\n{text}", flush=True)
            return
        if self.settings.fetch and jobs:
            _fetch(jobs)
        environ = hidden_environment(self.settings)
        for job in jobs:
            environ |= job_files.write(queue / str(job.point.number), values=job.values, cfg=job.cfg, platform=job.platform)
        points = [job.point for job in jobs]
        with local.terminable(), _cancelled(points):
            before: str | None = None
            for name, (text, group) in scripts.items():
                job_files.leave_text(queue / name, text)
                before = slurm_queue.submit(queue / name, environ, after=before if self.settings.max_concurrent else None)
                for job in group:
                    job.point.state, job.point.job = SUBMITTED, f"{before}_{job.point.number}"
                save()
                print(f"submitted as job {before}: {'; '.join(job.point.title for job in group)}", flush=True)
            if not self.settings.detach:
                follow(points, folder, poll=self.settings.poll_seconds)
        if self.settings.detach and points:
            names = ",".join(sorted({point.job.partition("_")[0] for point in points}))
            print(
                f"follow them: squeue --jobs={names}; tail -f {queue}/*/{job_files.OUTPUT}\nresults: recipe=collect sweep={folder}"
            )

    def _scripts(self, jobs: Sequence[SweepJob], queue: Path) -> dict[str, tuple[str, list[SweepJob]]]:
        """(script, jobs) by file name, one for each shape."""
        shapes: dict[JobShape, list[SweepJob]] = {}
        for job in jobs:
            shapes.setdefault(_shape(job, self.settings), []).append(job)
        python = self.settings.python or sys.executable
        made = {}
        for shape, group in shapes.items():
            numbers = [job.point.number for job in group]
            text = script(self.settings, shape, numbers, queue=queue, python=python, cwd=Path.cwd())
            made[f"points-{numbers[0]}.sbatch"] = (text, group)
        return made


def follow(points: Sequence[SweepRun], folder: Path, *, poll: float) -> None:
    """Prints every change of state until all points have ended."""
    gone: dict[int, float] = {}
    while waiting := [point for point in points if point.job and point.state in (WAITING, RUNNING, SUBMITTED)]:
        time.sleep(poll)
        update(waiting, folder, gone)


def update(points: Sequence[SweepRun], folder: Path, gone: dict[int, float]) -> None:
    """Updates `points` that had not ended. `gone` keeps between calls when each was first missing from the queue."""
    known = slurm_queue.look(point.job.partition("_")[0] for point in points)
    if known is None:
        return
    for point in points:
        state, nodes = known.get(point.job, ("", ""))
        if state in _WAITING or state in _ACTIVE:
            now = WAITING if state in _WAITING else RUNNING
            before, point.state = point.state, now
            if now not in (before, WAITING) or (now, before) == (WAITING, RUNNING):
                print(f"{point.title}: {now}{f' on {nodes}' if nodes and now == RUNNING else ''} (job {point.job})", flush=True)
            continue
        found = outcome(folder / QUEUE / str(point.number), point, state)
        since = gone.setdefault(point.number, time.monotonic())
        if isinstance(found, str):
            if time.monotonic() - since < _LATE:
                continue
            found = Failure(-1, 1, found, is_silent=True)
        point.finish(found)
        if point.state == DONE:
            print(f"{point.title}: {point.state}", flush=True)


def outcome(folder: Path, point: SweepRun, state: str) -> Outcome | str:
    """Returns how a point ended whose job ended in `state`; a text if its ranks have not reported (yet)."""
    found = job_files.outcomes(folder, point.world_size)
    failures = [each for each in found.values() if isinstance(each, Failure)]
    output = folder / job_files.OUTPUT
    if failures:
        return first(failures)
    if (folder / job_files.STOPPED).exists():
        return f"was stopped by a signal after a save and not queued again; continue with checkpoint.resume=auto, see {output}."
    if len(found) == point.world_size and state in ("COMPLETED", ""):
        return found[0]
    return f"SLURM ended it ({state or 'no longer known'}), and its ranks left no report; see {output}."


@contextlib.contextmanager
def _cancelled(points: Sequence[SweepRun]) -> Iterator[None]:
    """Cancels the jobs if the block is interrupted."""
    try:
        yield
    except BaseException:
        jobs = {point.job for point in points if point.state in (WAITING, RUNNING, SUBMITTED) and point.job}
        if jobs:
            print(f"cancelling {', '.join(sorted(jobs))}", file=sys.stderr, flush=True)
            slurm_queue.cancel(jobs)
        raise


def _shape(job: SweepJob, settings: SlurmSettings) -> JobShape:
    return JobShape.of(job.topology.world_size, job.platform, settings.ranks_per_node)


def _fetch(jobs: Sequence[SweepJob]) -> None:
    """Downloads models, tokenizers and data of all points to this user's caches, in one process."""
    print("fetching what the points need", flush=True)
    values = dict(jobs[0].values)
    values["recipe"] = {
        **values["recipe"],
        "target": FETCH,
        "single_process": True,
        "options": {"points": [job.values for job in jobs]},
    }
    local.launch(values, world_size=1, platform="cpu")


def collect(folder: Path) -> list[SweepRun]:
    """Reads and updates the points of the sweep in `folder`."""
    points = sweep.read(folder)
    open_points = [point for point in points if point.job and point.state in (WAITING, RUNNING, SUBMITTED)]
    if open_points:
        update(open_points, folder, {point.number: -_LATE for point in open_points})
    return points
