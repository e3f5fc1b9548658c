"""Collects the results of a sweep that was submitted to the queue: recipe=collect sweep=DIR."""

from __future__ import annotations

from pathlib import Path

from megabridge.config.schema import Config
from megabridge.launchers import preflight, results, slurm, sweep


def main(config: Config) -> None:
    """Updates sweep.json, writes sweep.csv and prints the table. Raises SweepFailure if a point failed or was refused."""
    folder = sweep_folder(config)
    points = slurm.collect(folder)
    sweep.write(folder, points)
    print(results.write(folder, points))
    if any(point.state in (sweep.FAILED, sweep.REFUSED) for point in points):
        raise sweep.SweepFailure(points)


def sweep_folder(config: Config) -> Path:
    """What sweep=DIR names. Raises MegabridgeError when that is no sweep's directory."""
    return preflight.sweep_folder(config)
