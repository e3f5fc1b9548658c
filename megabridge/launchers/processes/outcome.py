"""Outcomes of processes: success or failure, its report to the parent, and which of several failures is the cause. No torch."""

from __future__ import annotations

import json
import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from megabridge.errors import LONGEST, STOPPED_EXIT_CODE, MegabridgeError, plain, said
from megabridge.storage import crash_notes

CONFIG_ERROR: Final = 2
"""Exit status of a config that can't work."""


class Terminated(BaseException):
    """Raised when SIGTERM arrives."""


@dataclass(frozen=True)
class Done:
    """A process has succeeded."""

    objective: float | None = None
    """The value that the recipe returned."""


@dataclass(frozen=True)
class Failure:
    """A process has failed."""

    rank: int
    """-1 for a process that stands for all ranks, and for a timeout."""
    exit_code: int
    """As in subprocess: the negative number of the signal that ended it."""
    error: str
    """Message of an error that megabridge raised on purpose, else type and message; "" where another rank reports it."""
    traceback: str = ""
    """"" if nothing was raised."""
    is_expected: bool = False
    """Whether megabridge raised the error on purpose: then no traceback is shown."""
    is_silent: bool = False
    """Whether the process left no report: it was killed, crashed, or exited without one."""
    time: float = field(default_factory=time.monotonic)
    """Time of the failure in seconds of this host's monotonic clock."""

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """Makes the report of an error that ended `rank`. Never raises, whatever the error is like."""
        if isinstance(error, WorkerFailure):
            return error.failure
        if isinstance(error, SystemExit):
            return cls(rank, *_left(error), is_expected=True)
        codes = {KeyboardInterrupt: 128 + signal.SIGINT, Terminated: -signal.SIGTERM}
        is_expected = isinstance(error, MegabridgeError)
        error_text = plain(said(error), LONGEST if is_expected else LONGEST // 4)
        return cls(rank, codes.get(type(error), 1), error_text, _trace(error), is_expected)

    def text(self) -> str:
        """The text to show to the user, once."""
        who = "" if self.rank < 0 else f"rank {self.rank}: "
        trace = "" if self.is_expected or not self.traceback else f"{self.traceback.rstrip()}\n"
        return f"{trace}{who}{self.error}" if self.error else ""

    @property
    def is_cause(self) -> bool:
        """Whether it can't follow from another failure: no report was left, and it wasn't SIGABRT, which lost ranks can cause."""
        return self.is_silent and self.exit_code != -signal.SIGABRT

    @property
    def is_stop(self) -> bool:
        """Whether it says that the run was saved after a signal, which the run has shown itself."""
        return self.exit_code == STOPPED_EXIT_CODE and not self.is_silent

    @property
    def status(self) -> int:
        """The exit status of a command with this failure: 128 + signal as in a shell, or the rank's own code. Never 0."""
        return (128 - self.exit_code if self.exit_code < 0 else self.exit_code) % 256 or 1


Outcome = Done | Failure


class WorkerFailure(MegabridgeError):
    """A rank failed; the others were ended."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text())
        self.failure = failure


def of(work: Callable[[], float | None], rank: int) -> Outcome:
    """Runs `work`; returns the report of its success or of any exception."""
    try:
        return Done(work())
    except BaseException as error:
        return Failure.of(error, rank)


def write(descriptor: int, outcome: Outcome) -> None:
    """Writes the report to the file `descriptor`; `read` takes an incomplete one as none. A file, since a pipe needs a reader."""
    content = encoded(outcome).encode()
    os.ftruncate(descriptor, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)


def read(descriptor: int) -> Outcome | None:
    """Reads what `write` wrote; None where there is no complete report."""
    return decoded(os.pread(descriptor, os.fstat(descriptor).st_size, 0))


def encoded(outcome: Outcome) -> str:
    """The report as JSON in ASCII, which can hold any text."""
    return json.dumps({"failure": asdict(outcome)} if isinstance(outcome, Failure) else {"done": outcome.objective})


def decoded(text: str | bytes) -> Outcome | None:
    """Decodes a report of `encoded`; None for anything else, such as the half-written report of a killed process."""
    try:
        content = json.loads(text)
        if content.keys() == {"done"}:
            return Done(None if content["done"] is None else float(content["done"]))
        return _checked(content["failure"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def of_exit(rank: int, exit_code: int, report: Outcome | None, note: mmap.mmap) -> Outcome:
    """Judges a process that has ended with `exit_code`, by its `report` (None: it left none) and its crash `note`."""
    if isinstance(report, Failure) or (report is not None and exit_code == 0):
        return report
    if exit_code == 0:
        rule = "ended with exit status 0 and without a report before it was done; something in it called os._exit."
        return Failure(rank, 1, rule, is_silent=True)
    return Failure(rank, exit_code, _cause_of_death(exit_code, note, was_done=report is not None), is_silent=True)


def _cause_of_death(exit_code: int, note: mmap.mmap, *, was_done: bool) -> str:
    """Describes the end of a process that left no report of its failure."""
    if exit_code > 0:
        when = "after it was done" if was_done else "and without a report"
        return f"ended with exit code {exit_code} {when}; its own output may say why."
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    files = crash_notes.truncated_files(note) if name == "SIGBUS" else ""
    hints = {"SIGKILL": " (out of memory, or killed from outside)", "SIGBUS": f" (a file that it read was truncated){files}"}
    return f"was ended by {name}{' after it was done' if was_done else hints.get(name, '')}."


def first(failures: Iterable[Failure]) -> Failure:
    """The cause among failures of one run: one that can't follow from others, else the earliest reported one.

    A rank reports before its connections close and others fail.
    """
    return min(failures, key=lambda failure: (failure.is_stop, not failure.is_cause, failure.is_silent, failure.time))


def _left(error: SystemExit) -> tuple[int, str]:
    """(exit code, message) of a process that sys.exit ended, which is a failure: the recipe has not returned."""
    if type(error.code) is int:
        return error.code % 256 or 1, f"it was ended by sys.exit({error.code}) before the recipe returned."
    if error.code is None:
        return 1, "it was ended by sys.exit() before the recipe returned."
    return 1, said(error).partition(": ")[2] or "it was ended by sys.exit before the recipe returned."


def _trace(error: BaseException) -> str:
    try:
        return plain(
            "".join(traceback.format_exception(error)), LONGEST // 2
        )  # shown together with the message, which has the other half
    except BaseException as problem:
        return f"(no traceback: {said(problem)})"


def _checked(values: dict[str, Any]) -> Failure:
    """Makes a Failure from decoded values. Raises TypeError for values of other types."""
    failure = Failure(**values)
    kinds = {"rank": int, "exit_code": int, "error": str, "traceback": str, "is_expected": bool, "is_silent": bool, "time": float}
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise TypeError(name)
    return failure
