"""The clock of a run's console, console.log, and the lines of a start, before there are loggers. No torch.

All processes of a run on one host count from the moment that the command began, and append to one file.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Final

FILE_NAME: Final = "console.log"
_BEGAN: Final = "MEGABRIDGE_BEGAN"
"""That moment, in the environment of all that the command starts: of the monotonic clock, which they share."""
_FILE: Final = "MEGABRIDGE_CONSOLE"


def begin() -> None:
    """Sets the clock to 0; nothing is kept until `keep_in`."""
    os.environ[_BEGAN] = str(time.monotonic())
    os.environ.pop(_FILE, None)


def keep_in(run_dir: Path) -> None:
    """Has lines kept in this run's console.log."""
    os.environ[_FILE] = str(run_dir / FILE_NAME)


def elapsed() -> float:
    """Seconds since the command began."""
    if _BEGAN not in os.environ:
        os.environ[_BEGAN] = str(time.monotonic())
    return time.monotonic() - float(os.environ[_BEGAN])


def duration(seconds: float) -> str:
    """A time for people: 12 s, 3:05, 1:02:03."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def line(text: str) -> str:
    """`text` after the time."""
    seconds = elapsed()
    return f"[{f'{seconds:.1f} s' if seconds < 1000 else duration(seconds):>9}] {text}"


def say(text: str) -> None:
    """Prints a line of the start, where a command started this process: programs that use the library hear nothing."""
    if _BEGAN in os.environ:
        said = line(text)
        print(said, flush=True)
        record(said)


def record(text: str) -> None:
    """Appends to console.log, if there is one; what finds no room is not kept."""
    if file := os.environ.get(_FILE):
        with contextlib.suppress(OSError), Path(file).open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"{text}\n")
