"""The Python side of disk.c: a disk that fails, or a process that is killed, at a chosen call. In ranks started with it preloaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

NEVER = 1 << 40


def compiled(folder: Path) -> Path:
    """Compiles disk.c into `folder`; FileNotFoundError where there is no C compiler."""
    library = folder / "disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_suffix(".c"), "-ldl"], check=True)
    return library


def arm(
    below: Path, *, kill: int = 0, fail: tuple[int, int] = (0, 0), error: int = 0, exchange: bool = True, log: Path | None = None
) -> None:
    """Counts calls that change files below a folder from now on: the process ends at number `kill`, those in `fail` fail."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    numbers = [ctypes.c_long(number) for number in (kill, *fail)]
    library.disk_arm(os.fsencode(below), *numbers, error, int(not exchange), None if log is None else os.fsencode(log))


def count() -> int:
    """Calls since `arm`."""
    counted = ctypes.CDLL(os.environ["LD_PRELOAD"]).disk_count
    counted.restype = ctypes.c_long
    return int(counted())


@dataclass(frozen=True)
class Call:
    """A call that changed files: open, allocate, write, fsync, mkdir, unlink, rename or exchange."""

    kind: str
    path: Path
    other: Path


def calls(log: Path) -> list[Call]:
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    return [Call(kind, Path(path), Path(other)) for kind, path, other in rows]
