"""How a process ended: what it reports to whoever started it, and which of several failures is the cause. No torch."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from megabridge.errors import LONGEST, STOPPED_EXIT_CODE, MegabridgeError, plain, said

CONFIG_ERROR: Final = 2
"""Exit status of a config that can't work."""


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass(frozen=True)
class Done:
    """A process did all that it had to."""

    objective: float | None = None
    """What the recipe returned."""


@dataclass(frozen=True)
class Failure:
    """Why a process ended early."""

    rank: int
    """-1 for a process that stands for all ranks, or when the time was up."""
    exit_code: int
    """As in subprocess: negative for the signal that ended it."""
    error: str
    """The message of an error that megabridge raised on purpose, else type and message; "" where another rank says it."""
    traceback: str = ""
    """"" where nothing was raised."""
    is_expected: bool = False
    """Whether megabridge raised the error on purpose: then `error` says it all."""
    is_silent: bool = False
    """Whether the process left no report: it was killed, it crashed, or it left without a word."""
    time: float = field(default_factory=time.monotonic)
    """When, in seconds of this host's monotonic clock."""

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """What `rank` reports of an error that ended it. Raises nothing: whatever is wrong with the error, it is one."""
        if isinstance(error, WorkerFailure):
            return error.failure
        if isinstance(error, SystemExit):
            return cls(rank, *_left(error), is_expected=True)
        codes = {KeyboardInterrupt: 128 + signal.SIGINT, Terminated: -signal.SIGTERM}
        is_expected = isinstance(error, MegabridgeError)
        error_text = plain(said(error), LONGEST if is_expected else LONGEST // 4)
        return cls(rank, codes.get(type(error), 1), error_text, _trace(error), is_expected)

    def text(self) -> str:
        """What a user should see of it, once."""
        who = "" if self.rank < 0 else f"rank {self.rank}: "
        trace = "" if self.is_expected or not self.traceback else f"{self.traceback.rstrip()}\n"
        return f"{trace}{who}{self.error}" if self.error else ""

    @property
    def is_cause(self) -> bool:
        """Whether it can't follow from another's: no report was left, and an abort may be for want of other ranks."""
        return self.is_silent and self.exit_code != -signal.SIGABRT

    @property
    def is_stop(self) -> bool:
        """Whether it says that the run was saved after a signal, which the run has shown itself."""
        return self.exit_code == STOPPED_EXIT_CODE and not self.is_silent

    @property
    def status(self) -> int:
        """The exit status of a command that failed so: a shell's 128 + signal, or the rank's own code. Never 0."""
        return (128 - self.exit_code if self.exit_code < 0 else self.exit_code) % 256 or 1


Outcome = Done | Failure


class WorkerFailure(MegabridgeError):
    """A rank failed; the others were ended."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text())
        self.failure = failure


def of(work: Callable[[], float | None], rank: int) -> Outcome:
    """Does all of a process's work; returns what the process is to report, whatever happens in it."""
    try:
        return Done(work())
    except BaseException as error:
        return Failure.of(error, rank)


def write(descriptor: int, outcome: Outcome) -> None:
    """Leaves the report in the file `descriptor`, whole or not at all as `read` sees it. A file: no reader has to wait for it."""
    content = encoded(outcome).encode()
    os.ftruncate(descriptor, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)


def read(descriptor: int) -> Outcome | None:
    """What `write` left; None where there is no whole report."""
    return decoded(os.pread(descriptor, os.fstat(descriptor).st_size, 0))


def encoded(outcome: Outcome) -> str:
    """The report as JSON in ASCII: any text can be in it."""
    return json.dumps({"failure": asdict(outcome)} if isinstance(outcome, Failure) else {"done": outcome.objective})


def decoded(text: str | bytes) -> Outcome | None:
    """The report that `encoded` wrote; None for anything else: whoever wrote it was killed in the middle, or wrote elsewhere."""
    try:
        content = json.loads(text)
        if content.keys() == {"done"}:
            return Done(None if content["done"] is None else float(content["done"]))
        return _checked(content["failure"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def first(failures: Iterable[Failure]) -> Failure:
    """The cause among failures of one run: one that can't follow from others, else the earliest that was reported.

    A rank reports before its connections close and others fail.
    """
    return min(failures, key=lambda failure: (failure.is_stop, not failure.is_cause, failure.is_silent, failure.time))


def _left(error: SystemExit) -> tuple[int, str]:
    """(exit code, message) of a process that sys.exit ended: no recipe has done its work that did not return."""
    if type(error.code) is int:
        return error.code % 256 or 1, f"it was ended by sys.exit({error.code}) before the recipe returned."
    if error.code is None:
        return 1, "it was ended by sys.exit() before the recipe returned."
    return 1, said(error).partition(": ")[2] or "it was ended by sys.exit before the recipe returned."


def _trace(error: BaseException) -> str:
    try:
        return plain("".join(traceback.format_exception(error)), LONGEST // 2)  # both are shown as one text
    except BaseException as problem:
        return f"(no traceback: {said(problem)})"


def _checked(values: dict[str, Any]) -> Failure:
    """Raises TypeError for values that are not a Failure's."""
    failure = Failure(**values)
    kinds = {"rank": int, "exit_code": int, "error": str, "traceback": str, "is_expected": bool, "is_silent": bool, "time": float}
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise TypeError(name)
    return failure
