"""What a run left in its metrics.jsonl. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

FILE_NAME: Final = "metrics.jsonl"


def read(run_dir: Path) -> list[dict[str, float | None]]:
    """All complete lines of a run's metrics.jsonl, oldest first; a torn line of a killed run is left out."""
    rows = []
    for line in (run_dir / FILE_NAME).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
