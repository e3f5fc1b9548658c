"""Results of a sweep: one row per point, best first, as sweep.csv and as a table for the console. No torch."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megabridge.errors import plain
from megabridge.storage import atomic_files, metrics_file, regular_files

if TYPE_CHECKING:
    from megabridge.launchers.sweep import SweepRun

CSV: Final = "sweep.csv"
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\n")
"""First characters of a cell that a spreadsheet takes as a formula (OWASP, CSV injection)."""
MEASURES: Final = {
    "objective": "what the recipe returned",
    "best_validation_loss": "lowest validation/loss, nats per token",
    "tokens_per_second": "median of train/tokens_per_second, without the first logged step",
    "mfu": "median of train/mfu",
    "memory_gib": "largest train/memory_gib",
    "parity": "parity/logits_max_abs_diff of the last export",
}
"""The numeric columns of a row, and the source of each in the point's metrics.jsonl."""


@dataclass(frozen=True)
class Row:
    """One point's results. A measure that the run didn't log is None."""

    number: int
    state: str
    varied: dict[str, str]
    """Overrides that differ between the points, value by key."""
    measures: dict[str, float | None]
    run_dir: str
    error: str
    losses: list[tuple[int, float]]
    """(step, validation loss) in chronological order."""


def rows(points: Sequence[SweepRun]) -> list[Row]:
    """Returns a row for each point, best first: by objective, then those without one."""
    differing = varied([point.overrides for point in points])
    made = [_row(point, each) for point, each in zip(points, differing, strict=True)]
    return sorted(made, key=lambda row: (_rank(row), row.number))


def varied(points: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Returns for each point the overrides that differ between points, value by key; all have the same keys."""
    overrides = [_keyed(each) for each in points]
    keys = list(dict.fromkeys(key for each in overrides for key in each))
    differing = [key for key in keys if len({each.get(key) for each in overrides}) > 1]
    return [{key: each.get(key, "") for key in differing} for each in overrides]


def write(folder: Path, points: Sequence[SweepRun]) -> str:
    """Writes sweep.csv to the sweep's directory; returns the ranked table for the console, with a line if that failed."""
    found = rows(points)
    try:
        atomic_files.write(folder / CSV, as_csv(found))
        said = str(folder / CSV)
    except OSError as error:
        said = f"{folder / CSV} can't be written ({error.strerror}); free space there, and recipe=collect sweep={folder} writes it"
    return f"{as_table(found)}\n{said}; compare the runs: recipe=report sweep={folder}"


def as_csv(found: Sequence[Row]) -> str:
    """Returns the rows as CSV with a header. A text that a spreadsheet would take as a formula gets an apostrophe in front."""
    keys = list(found[0].varied) if found else []
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["rank", "point", "state", *map(_cell, keys), *MEASURES, "run_dir", "error"])
    for rank, row in enumerate(found, 1):
        measures = ["" if row.measures[name] is None else repr(row.measures[name]) for name in MEASURES]
        texts = [_cell(text) for text in (row.state, *row.varied.values())]
        writer.writerow([rank, row.number, *texts, *measures, _cell(row.run_dir), _cell(row.error)])
    return file.getvalue()


def _cell(text: str) -> str:
    text = plain(text)
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_table(found: Sequence[Row]) -> str:
    """Returns the rows as a text table with a header, without measures that no run has."""
    names = shown(found)
    lines = [["rank", "point", *(found[0].varied if found else ()), "state", *names]]
    for rank, row in enumerate(found, 1):
        lines.append([str(rank), str(row.number), *row.varied.values(), row.state, *(number(row.measures[name]) for name in names)])
    lines = [[" ".join(plain(text).split()) for text in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def shown(found: Sequence[Row]) -> list[str]:
    """The measures that at least one row has."""
    return [name for name in MEASURES if any(row.measures[name] is not None for row in found)]


def number(value: float | None) -> str:
    """Formats a measure for display."""
    return "" if value is None else f"{value:.6g}"


def _row(point: SweepRun, differing: dict[str, str]) -> Row:
    logged = _logged(Path(point.run_dir))
    losses = [(int(step or 0), loss) for step, loss in _series(logged, "validation/loss")]
    speeds = [value for _, value in _series(logged, "train/tokens_per_second")]
    mfus = [value for _, value in _series(logged, "train/mfu")]
    memory = [value for _, value in _series(logged, "train/memory_gib")]
    parity = [value for _, value in _series(logged, "parity/logits_max_abs_diff")]
    measures = {
        "objective": point.objective,
        "best_validation_loss": min((loss for _, loss in losses), default=None),
        "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,
        "mfu": statistics.median(mfus[1:] or mfus) if mfus else None,
        "memory_gib": max(memory, default=None),
        "parity": parity[-1] if parity else None,
    }
    return Row(point.number, point.state, differing, measures, point.run_dir, point.error, losses)


def _series(logged: Sequence[dict[str, float | None]], name: str) -> list[tuple[float | None, float]]:
    return [(line.get("step"), value) for line in logged if (value := line.get(name)) is not None]


def _logged(run_dir: Path) -> list[dict[str, float | None]]:
    """The run's metrics; none where it wrote no file."""
    return metrics_file.read(run_dir) if regular_files.exists(run_dir / metrics_file.FILE_NAME) else []


def _keyed(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides as value by key, without the backslashes with which Hydra escapes its grammar."""
    return {key.lstrip("+"): value.replace("\\", "") for key, _, value in (text.partition("=") for text in overrides)}


def _rank(row: Row) -> float:
    objective = row.measures["objective"]
    if objective is None or objective != objective:
        return float("inf")
    return objective
