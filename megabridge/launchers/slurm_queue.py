"""Calls SLURM's commands: sbatch, squeue, scancel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from megabridge.errors import ConfigError, MegabridgeError

_OUTER: Final = ("SLURM_", "SBATCH_", "SRUN_")
_FORMAT: Final = "%F_%K %T %N"  # array job, index, state, nodes


def submit(script: Path, secrets: Mapping[str, str], *, after: str | None) -> str:
    """Submits the script, to start when job `after` has ended; returns the job's id.

    The job's environment is this process's and `secrets`. Raises MegabridgeError with SLURM's reason for a refusal.
    """
    dependency = [] if after is None else [f"--dependency=afterany:{after}"]
    done = _call(["sbatch", "--parsable", *dependency, str(script)], secrets)
    if done.returncode:
        raise MegabridgeError(f"sbatch refused {script}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]


def look(jobs: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """Returns state and nodes of every array element (12_3) that SLURM still knows; None when it didn't answer."""
    names = sorted(set(jobs))
    done = _call(["squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}", f"--jobs={','.join(names)}"])
    if done.returncode:
        return {} if "Invalid job id" in done.stderr else None
    found = {}
    for line in done.stdout.splitlines():
        name, state, *nodes = line.split()
        found[name] = (state, nodes[0] if nodes else "")
    return found


def cancel(jobs: Iterable[str]) -> None:
    """Cancels the jobs."""
    _call(["scancel", *sorted(set(jobs))])


def _call(command: list[str], more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    # Inside an allocation sbatch would inherit the outer job's settings.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_OUTER) or name == "SLURM_CONF"}
    try:
        # In a session of its own, so that Ctrl-C reaches only the launcher, which still has to cancel.
        return subprocess.run(
            command, env=clean | dict(more or {}), capture_output=True, text=True, check=False, start_new_session=True
        )
    except FileNotFoundError as error:
        raise ConfigError(f"hydra/launcher=slurm needs {command[0]}, which is not on PATH; run it on a login node.") from error
