"""metrics.jsonl in the run's directory: one JSON object a line, readable while the run goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, override

from megabridge.config.schema import Config
from megabridge.loggers.logger import Logger
from megabridge.loggers.metrics_file import FILE_NAME


class JsonLines(Logger):
    """Appends {"step": ..., "time": seconds since 1970, metrics...} to metrics.jsonl; a resumed run goes on in the same file.

    A value that is not a number in JSON (NaN, infinity) is written as null. Rows of a table NAME are appended to NAME.jsonl.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._file: IO[str] | None = None

    @override
    def start(self, run_dir: Path, config: Config) -> None:
        self._folder = run_dir
        self._file = _appended(run_dir / FILE_NAME)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    @override
    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        if self._folder is not None:
            with _appended(self._folder / f"{name}.jsonl") as file:
                file.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)

    @override
    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _appended(path: Path) -> IO[str]:
    """The file, open for whole lines at its end."""
    # A killed run may have left half a line; what follows must not be glued to it.
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file
