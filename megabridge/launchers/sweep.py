"""Sweeps: composes, checks and runs the points, records their state, and returns results to Hydra's sweeper. No torch.

Every point is composed and checked first; one that can't run is refused with a reason, and the others run. A `Runner` runs
them. `sweep.json` in the sweep's directory records the points, so that another process can collect their results later
(recipe=collect).
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from megabridge.config import schema, validation
from megabridge.errors import CheckpointError, MegabridgeError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.launchers import chosen_layout, results, run_lock
from megabridge.launchers.prepare import resolve, write_config
from megabridge.launchers.processes.outcome import CONFIG_ERROR, Failure, Outcome
from megabridge.layouts.devices import Machine
from megabridge.parallel.topology import Topology
from megabridge.storage import atomic_files, regular_files

RECORD: Final = "sweep.json"
STATES: Final = ("waiting", "running", "done", "failed", "refused", "submitted")
WAITING, RUNNING, DONE, FAILED, REFUSED, SUBMITTED = STATES


@dataclass
class SweepRun:
    """One point of a sweep, as recorded in sweep.json."""

    number: int
    """Hydra's job number, counted over all batches of the sweeper."""
    overrides: list[str]
    """The overrides that Hydra composed it with."""
    run_dir: str
    """Absolute path."""
    label: str = ""
    """The overrides that differ between the points."""
    state: str = WAITING
    objective: float | None = None
    """The value that the recipe returned, the validation loss."""
    error: str = ""
    """Why it was refused, or the first failure of its ranks."""
    status: int = 0
    """Exit status of a failed run."""
    job: str = ""
    """Its job in the queue, e.g. 12_3."""
    world_size: int = 1
    """Number of ranks."""

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"point {self.number} ({self.label})" if self.label else f"point {self.number}"

    def finish(self, outcome: Outcome) -> None:
        """Records how it ended, and prints its error."""
        if isinstance(outcome, Failure):
            self.state, self.error, self.status = FAILED, outcome.text(), outcome.status
            word = "is stopped" if outcome.is_stop else "failed"
            print(f"megabridge: {self.title} {word}: {self.error}", file=sys.stderr, flush=True)
        else:
            self.state, self.objective = DONE, outcome.objective

    def refuse(self, error: MegabridgeError) -> None:
        """Records and prints why it can't run."""
        self.state, self.error, self.status = REFUSED, str(error), CONFIG_ERROR
        print(f"megabridge: {self.title} is refused: {self.error}", file=sys.stderr, flush=True)


@dataclass
class SweepJob:
    """A point with everything that its processes need."""

    point: SweepRun
    cfg: DictConfig
    values: dict[str, Any] = field(default_factory=dict)
    config: schema.Config = field(default_factory=schema.Config)
    topology: Topology = field(default_factory=Topology)
    """The topology of its processes."""
    platform: str = ""
    """cpu or cuda. Set by the runner's `check`."""


class Runner(Protocol):
    """Runs the points of a sweep."""

    def machine(self, config: schema.Config) -> Machine:
        """Returns the devices that a layout is chosen for. Raises ConfigError where they aren't known."""

    def check(self, job: SweepJob) -> None:
        """Chooses the job's platform. Raises ConfigError when it can't run here."""

    def run(self, jobs: Sequence[SweepJob], folder: Path, save: Callable[[], None]) -> None:
        """Runs all jobs of the sweep in `folder` and finishes their points, or leaves them `SUBMITTED`.

        `save` records the points' state, in case this process ends early.
        """


class SweepFailure(MegabridgeError):
    """Some points are not done. The error of each was printed when it occurred."""

    def __init__(self, points: Sequence[SweepRun]) -> None:
        lost = [point for point in points if point.state in (FAILED, REFUSED)]
        counts = [f"{sum(point.state == state for point in lost)} {state}" for state in (FAILED, REFUSED)]
        said = ", ".join(count for count in counts if not count.startswith("0 "))
        super().__init__(f"{len(lost)} of {len(points)} points are not done: {said}.")
        failed = [point.status for point in lost if point.state == FAILED]
        self.status = (failed[0] or 1) if failed else CONFIG_ERROR


class _Failed(JobReturn):
    """Result of a point that is not done. Hydra's own class would print the point's overrides when its value is read."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: SweepFailure) -> None:
        self._return_value = value


def run(context: Any, master: DictConfig, overrides: Sequence[Sequence[str]], first: int, runner: Runner) -> list[JobReturn]:
    """Runs a batch of points and writes the sweep's results; returns what a Hydra launcher returns to its sweeper.

    `context` is Hydra's HydraContext, `master` the sweep's config, whose directory is locked, `first` the first point's number.
    """
    setup_globals()
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    folder = Path(str(master.hydra.sweep.dir)).absolute()
    jobs = [_composed(context, master, list(each), first + index) for index, each in enumerate(overrides)]
    for job, differing in zip(jobs, results.varied([job.point.overrides for job in jobs]), strict=True):
        job.point.label = " ".join(f"{key}={value}" for key, value in differing.items())
        try:
            _check(job, runner)
        except MegabridgeError as error:
            job.point.refuse(error)
    before = read(folder)[:first] if first else []
    points = [*before, *(job.point for job in jobs)]
    write(folder, points)
    save = partial(_save, folder, points)
    try:
        runner.run([job for job in jobs if job.point.state == WAITING], folder, save)
    finally:
        save()
    if any(point.state not in (REFUSED, WAITING, SUBMITTED) for point in points):
        print(results.write(folder, points), flush=True)
    return [_returned(job, points) for job in jobs]


def write(folder: Path, points: Sequence[SweepRun]) -> None:
    """Writes sweep.json to the sweep's directory atomically. Raises MegabridgeError, and then leaves an earlier one as it was."""
    try:
        atomic_files.write(folder / RECORD, json.dumps([asdict(point) for point in points], indent=1) + "\n")
    except OSError as error:
        raise MegabridgeError(f"{folder / RECORD} can't be written ({error.strerror}); free space there.") from error


def _save(folder: Path, points: Sequence[SweepRun]) -> None:
    """Writes as `write` does, during a sweep: an error is printed, and the sweep continues."""
    try:
        write(folder, points)
    except MegabridgeError as error:
        print(f"megabridge: {error} The sweep goes on.", file=sys.stderr, flush=True)


def read(folder: Path) -> list[SweepRun]:
    """Reads the points that `write` wrote. Raises MegabridgeError where there is no sweep."""
    try:
        content = json.loads(regular_files.read(folder / RECORD))
        if not isinstance(content, list):
            raise TypeError(f"it holds a {type(content).__name__}, not a list")
        return [_point(row) for row in content]
    except (CheckpointError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MegabridgeError(
            f"sweep={folder} must be the directory of a sweep that hydra/launcher=slurm or local started, with a {RECORD}: {error}."
        ) from error


def _point(row: Mapping[str, Any]) -> SweepRun:
    """Reads one point of sweep.json. Raises ValueError or TypeError for other content, since the file may be someone else's."""
    names = {each.name for each in fields(SweepRun)}
    point = SweepRun(**{name: value for name, value in row.items() if name in names})
    texts = (point.run_dir, point.label, point.state, point.error, point.job)
    numbers = (point.number, point.status, point.world_size)
    if type(point.overrides) is not list or not all(type(text) is str for text in (*texts, *point.overrides)):
        raise TypeError(f"point {str(point.number)[:20]} must have texts as overrides, run_dir, label, state, error and job")
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in numbers):
        raise TypeError(f"point {str(point.number)[:20]} must have whole numbers as number, status and world_size")
    if point.state not in STATES:
        raise ValueError(f"state={point.state[:20]!r} of point {point.number} must be one of {', '.join(STATES)}")
    if point.objective is not None:
        if type(point.objective) not in (int, float):
            raise TypeError(f"objective of point {point.number} must be a number")
        point.objective = float(point.objective)
    return point


def _composed(context: Any, master: DictConfig, overrides: list[str], number: int) -> SweepJob:
    """Composes the config of one point as Hydra's own launcher does."""
    full = context.config_loader.load_sweep_config(master, overrides)
    with open_dict(full):
        full.hydra.job.id = str(number)
        full.hydra.job.num = number
    HydraConfig.instance().set_config(full)  # ${hydra:...} resolves to this point's values
    run_dir = Path(str(full.hydra.sweep.dir), str(full.hydra.sweep.subdir)).absolute()
    typed: Any = OmegaConf.to_container(full.hydra.overrides.task, resolve=False)
    cfg = copy.deepcopy(full)
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    point = SweepRun(number, [str(text) for text in typed], str(run_dir))
    return SweepJob(point, cfg)


def _check(job: SweepJob, runner: Runner) -> None:
    """Checks a point before it runs, and writes its config.yaml. Raises ConfigError for settings that can't work."""
    job.values, job.config = resolve(job.cfg, Path(job.point.run_dir), job.point.overrides)
    job.config = chosen_layout.settle(job.cfg, job.values, job.config, job.point.overrides, partial(runner.machine, job.config))
    if not chosen_layout.is_open(job.config):
        validation.check_layout(job.config, schema.topology(job.config.parallel), known_sizes(job.config.model))
    job.topology = schema.processes(job.config)
    job.point.world_size = job.topology.world_size
    runner.check(job)
    with run_lock.claimed(Path(job.point.run_dir)):  # and released until the point runs
        write_config(job.cfg, job.values)


def _returned(job: SweepJob, points: Sequence[SweepRun]) -> JobReturn:
    failed = job.point.state in (FAILED, REFUSED)
    returned = (_Failed if failed else JobReturn)(
        overrides=job.point.overrides, cfg=job.cfg, working_dir=job.point.run_dir, task_name=os.environ.get("HYDRA_JOB_NAME", "run")
    )
    returned.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    returned.return_value = SweepFailure(points) if failed else job.point.objective
    return returned
