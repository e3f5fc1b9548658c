"""What a run left in its metrics.jsonl. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final

from megabridge.storage import regular_files

FILE_NAME: Final = "metrics.jsonl"


def read(run_dir: Path) -> list[dict[str, float | None]]:
    """All complete lines of a run's metrics.jsonl, oldest first; a torn line of a killed run is left out.

    What is not a finite number counts as not logged: the file may be of others. Raises CheckpointError where it is no file.
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
