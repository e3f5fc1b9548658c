"""Reads a run's metrics.jsonl. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final

from megabridge.storage import regular_files

FILE_NAME: Final = "metrics.jsonl"


def read(run_dir: Path) -> list[dict[str, float | None]]:
    """Reads all complete lines of a run's metrics.jsonl, oldest first; the half-written line of a killed run is left out.

    Values that are not finite numbers become None: the file may be someone else's. Raises CheckpointError if it can't be read.
    """
    rows = []
    with regular_files.opened(run_dir / FILE_NAME) as file:
        for line in file:
            try:
                content = json.loads(line)
                rows.append({str(name): _number(value) for name, value in content.items()})
            except (ValueError, AttributeError, RecursionError):
                continue
    return rows


def _number(value: object) -> float | None:
    if type(value) is float or (type(value) is int and abs(value) < 1 << 53):
        return value if math.isfinite(value) else None
    return None
