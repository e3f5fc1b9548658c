"""Hydra plugins `hydra/launcher=local` and `hydra/launcher=slurm`.

Hydra takes plugins only from modules below the namespace `hydra_plugins`, which it imports by that name: launchers/run.py puts
the folder above this one on sys.path. Hydra imports this at every start, so the launchers themselves are imported when used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _SweepLauncher(Launcher):
    """Base of the launchers: Hydra builds one from its settings, and passes it every batch of points of its sweeper."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Locks the sweep's directory for this process, before the sweeper writes there."""
        from megabridge.launchers import run_lock

        run_lock.take(Path(str(config.hydra.sweep.dir)).absolute(), "hydra.sweep.dir")
        self.hydra_context = hydra_context
        self.config = config


class LocalLauncher(_SweepLauncher):
    """Runs points on this host, one after another or several at once."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from megabridge.launchers import local_sweep, sweep
        from megabridge.launchers.settings import LocalSettings

        settings = LocalSettings(**self.settings)
        return sweep.run(self.hydra_context, self.config, job_overrides, initial_job_idx, local_sweep.runner(settings))


class SlurmLauncher(_SweepLauncher):
    """Runs points as job arrays of SLURM."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from megabridge.launchers import slurm, sweep
        from megabridge.launchers.settings import SlurmSettings

        settings = SlurmSettings(**self.settings)
        return sweep.run(self.hydra_context, self.config, job_overrides, initial_job_idx, slurm.runner(settings))
