"""What a worker tells its launcher, in an unnamed file: the recipe's objective, or the first failure."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Final

from megabridge.errors import MegabridgeError

CONFIG_ERROR: Final = 2
"""Exit status of a config that can't work."""


@dataclass(frozen=True)
class Failure:
    """Why a rank ended early."""

    rank: int
    """-1 when the process that should start the ranks failed."""
    exit_code: int
    """As in subprocess: negative for the signal that ended the rank."""
    error: str
    """One line."""
    traceback: str = ""
    """Empty when the rank was killed."""
    is_expected: bool = False
    """Whether megabridge raised the error on purpose: then `error` says it all."""
    time: float = field(default_factory=time.monotonic)
    """When, in seconds of this host's monotonic clock."""

    def text(self) -> str:
        """What a user should see of it, once."""
        who = "" if self.rank < 0 else f"rank {self.rank}: "
        trace = "" if self.is_expected or not self.traceback else f"{self.traceback.rstrip()}\n"
        return f"{trace}{who}{self.error}"

    @property
    def status(self) -> int:
        """The exit status of a command that failed so: a shell's 128 + signal, or the rank's own code."""
        return 128 - self.exit_code if self.exit_code < 0 else (self.exit_code or 1)


class WorkerFailure(MegabridgeError):
    """A rank failed; the others were ended."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text())
        self.failure = failure


def write(descriptor: int, outcome: Failure | float | None) -> None:
    """Leaves the outcome in the file `descriptor`, which the launcher reads when this process has ended."""
    os.pwrite(descriptor, text(outcome).encode(), 0)


def read(descriptor: int) -> Failure | float | None:
    """What `write` left; None when nothing was."""
    return parsed(os.pread(descriptor, os.fstat(descriptor).st_size, 0))


def text(outcome: Failure | float | None) -> str:
    """The outcome as JSON."""
    return json.dumps({"failure": asdict(outcome)} if isinstance(outcome, Failure) else {"objective": outcome})


def parsed(text: str | bytes) -> Failure | float | None:
    """The outcome that `text` wrote; None for nothing."""
    content = json.loads(text) if text else {}
    if "failure" in content:
        return Failure(**content["failure"])
    objective = content.get("objective")
    return None if objective is None else float(objective)


def first(failures: Iterable[Failure]) -> Failure:
    """The cause among failures of one run: a rank that left no report, as others fail for want of it; else the earliest."""
    return min(failures, key=lambda failure: (bool(failure.traceback), failure.time))
