"""Generates the batch script of a job array from settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megabridge.config import redaction
from megabridge.errors import ConfigError
from megabridge.launchers import job_files
from megabridge.launchers.settings import SlurmSettings

OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Environment that keeps ranks from contacting a hub, since the submitting host has downloaded everything."""

RANK_TASK: Final = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1)); "
    "os.execv(sys.executable, [sys.executable, '-m', 'megabridge.launchers.rank_task', sys.argv[1]])"
)
"""Python code that starts megabridge.launchers.rank_task with the queue's signals blocked, so that none is lost meanwhile."""


@dataclass(frozen=True)
class JobShape:
    """Resources of one point. Points of one shape go into one job array."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.nodes * self.ranks_per_node

    @classmethod
    def of(cls, world_size: int, platform: str, most: int) -> JobShape:
        """Returns the shape with the fewest nodes, with at most `most` ranks and the same number on each. Raises ConfigError."""
        if most < 1:
            raise ConfigError(f"hydra.launcher.ranks_per_node={most} must be at least 1.")
        nodes = next(count for count in range(1, world_size + 1) if world_size % count == 0 and world_size // count <= most)
        each = world_size // nodes
        return cls(nodes, each, each if platform == "cuda" else 0)


def script(settings: SlurmSettings, shape: JobShape, numbers: Sequence[int], *, queue: Path, python: str, cwd: Path) -> str:
    """Returns the script for points `numbers` of one shape, whose folders are in `queue`, named by their numbers."""
    header = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in _options(settings, shape, numbers, queue, cwd))]
    body = [
        "# Each rank leaves its outcome in the point's folder; a run that was stopped after a save is queued again.",
        "set -eo pipefail",
        f"point={shlex.quote(str(queue))}/$SLURM_ARRAY_TASK_ID",
        f'rm -f "$point"/rank-*.json "$point"/{job_files.STOPPED}',
        *(f"module load {shlex.quote(name)}" for name in settings.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in _environment(settings).items()),
        *settings.setup,
        "status=0",
        f'{shlex.join(_srun(settings, shape))} {shlex.join([python, "-ISc", RANK_TASK])} "$point" || status=$?',
    ]
    if settings.requeue:
        body += [f'[ ! -e "$point/{job_files.STOPPED}" ] || scontrol requeue "$SLURM_JOB_ID"']
    return "\n".join([*header, *body, 'exit "$status"']) + "\n"


def hidden_environment(settings: SlurmSettings) -> dict[str, str]:
    """Returns the environment variables of the settings that a script must not contain."""
    return {name: value for name, value in settings.environment.items() if redaction.is_secret(name)}


def _environment(settings: SlurmSettings) -> dict[str, str]:
    shown = {name: value for name, value in settings.environment.items() if not redaction.is_secret(name)}
    return (OFFLINE if settings.fetch else {}) | shown


def _options(settings: SlurmSettings, shape: JobShape, numbers: Sequence[int], queue: Path, cwd: Path) -> list[str]:
    limit = "" if settings.max_concurrent is None else f"%{settings.max_concurrent}"
    chosen: Mapping[str, object | None] = {
        "job-name": "megabridge",
        "array": f"{ranges(numbers)}{limit}",
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": settings.time,
        "nodes": shape.nodes,
        "ntasks": shape.ranks,
        "ntasks-per-node": shape.ranks_per_node,
        "cpus-per-task": settings.cpus_per_task,
        "mem": settings.memory,
        "gres": f"{settings.gres}:{shape.gpus_per_node}" if settings.gres and shape.gpus_per_node else None,
        "gpus-per-node": shape.gpus_per_node or None if settings.gres is None else None,
        "signal": f"USR1@{settings.signal_seconds}",
        "open-mode": "append",
        "export": "ALL",
        "chdir": cwd,
        "output": queue / "%a" / job_files.OUTPUT,
    }
    flags = ["--requeue" if settings.requeue else "--no-requeue", *(["--exclusive"] if settings.exclusive else [])]
    options = [f"--{name}={_quoted(value)}" for name, value in chosen.items() if value is not None]
    return [*options, *flags, *settings.extra]


def _quoted(value: object) -> str:
    text = str(value)
    return f'"{text}"' if " " in text else text


def _srun(settings: SlurmSettings, shape: JobShape) -> list[str]:
    command = ["srun", f"--ntasks={shape.ranks}", f"--ntasks-per-node={shape.ranks_per_node}", "--kill-on-bad-exit=1"]
    if settings.cpus_per_task is not None:
        command.append(f"--cpus-per-task={settings.cpus_per_task}")  # since SLURM 22.05 srun doesn't take it from the job
    if settings.container_image is not None:
        command.append(f"--container-image={settings.container_image}")
    if settings.container_mounts:
        command.append(f"--container-mounts={','.join(settings.container_mounts)}")
    return [*command, *settings.srun]


def ranges(numbers: Sequence[int]) -> str:
    """Formats numbers as ranges: [0, 1, 2, 5] -> 0-2,5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
