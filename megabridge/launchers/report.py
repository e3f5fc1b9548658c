"""What a worker tells its launcher, in an unnamed file: the recipe's objective, or the first failure."""

from __future__ import annotations

import json
import os
import time
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
    content = {"failure": asdict(outcome)} if isinstance(outcome, Failure) else {"objective": outcome}
    os.pwrite(descriptor, json.dumps(content).encode(), 0)


def read(descriptor: int) -> Failure | float | None:
    """What `write` left; None when nothing was."""
    text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    content = json.loads(text) if text else {}
    if "failure" in content:
        return Failure(**content["failure"])
    objective = content.get("objective")
    return None if objective is None else float(objective)
