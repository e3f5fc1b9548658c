"""Writes metrics.jsonl in the run's directory: one JSON object per line, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, override

from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.loggers.logger import Logger
from megabridge.storage import atomic_files, regular_files
from megabridge.storage.metrics_file import FILE_NAME

MOST: Final = 16 << 20
"""Bytes of lines that are buffered in memory while the disk is full; further lines are dropped."""


class JsonLines(Logger):
    """Appends {"step": ..., "time": seconds since 1970, metrics...} to metrics.jsonl; a resumed run goes on in the same file.

    A value that JSON can't hold (NaN, infinity) is written as null. Rows of a table NAME are appended to NAME.jsonl. When the disk
    is full, a message is printed once, and lines are buffered until there is room again.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files: dict[str, _Lines] = {}

    @override
    def start(self, run_dir: Path, config: Config) -> None:
        self._folder = run_dir
        self._file(FILE_NAME).open()

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._add(FILE_NAME, [json.dumps({"step": step, "time": round(time.time(), 3), **values})])

    @override
    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        self._add(f"{name}.jsonl", [json.dumps({"step": step, **row}, ensure_ascii=False) for row in rows])

    @override
    def finish(self) -> None:
        for file in self._files.values():
            file.close()
        self._files, self._folder = {}, None

    def _file(self, name: str) -> _Lines:
        assert self._folder is not None
        return self._files.setdefault(name, _Lines(self._folder / name))

    def _add(self, name: str, lines: Sequence[str]) -> None:
        if self._folder is not None:
            self._file(name).add(lines)


class _Lines:
    """Appends whole lines to a file. Lines that can't be written are kept in order and tried again with the next ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._waiting = bytearray()
        self._missing = 0
        self._is_said = False

    def open(self) -> None:
        """Opens the file. Raises ConfigError if it can't be written, but not for a full disk, which may have room later."""
        try:
            self._opened()
        except OSError as error:
            if error.errno not in atomic_files.NO_ROOM:
                reason = regular_files.reason(error)
                raise ConfigError(
                    f"{self._path} must be a file that can be written, but: {reason}; remove it, or set another run_dir."
                ) from error
            self._say(error)

    def add(self, lines: Sequence[str]) -> None:
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
        if self._waiting:
            self._write()
        if len(self._waiting) + len(content) > MOST:
            self._missing += len(lines)
        else:
            self._waiting += content
            self._write()

    def close(self) -> None:
        self._write()
        if missing := self._missing + self._waiting.count(b"\n"):
            print(f"{self._path} is without the last {missing} lines: there was no room for them", flush=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _write(self) -> None:
        try:
            if self._descriptor < 0:
                self._opened()
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            self._say(error)
            return
        if self._is_said:
            lost = f"{self._missing} lines are missing in it" if self._missing else "nothing is missing"
            print(f"{self._path} can be written again; {lost}", flush=True)
            self._is_said, self._missing = False, 0

    def _opened(self) -> None:
        # Without O_NONBLOCK a pipe waits for its other end.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(0, "it is no regular file")
        if status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n":
            # A killed run may have left half a line, to which nothing must be appended.
            self._waiting[:0] = b"\n"
        self._descriptor = descriptor

    def _say(self, error: OSError) -> None:
        if not self._is_said:
            text = f"can't be written ({regular_files.reason(error)}); the run goes on, and its lines wait until they can be"
            print(f"{self._path} {text}", flush=True)
        self._is_said = True
