"""Runs an evaluation in a separate process and not in a rank.

lm-evaluation-harness seeds every random generator, a second model would stay in torch's allocator, and a process that runs out of
memory takes nothing with it. It also reads the folder as any user of the model would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megabridge.errors import MegabridgeError
from megabridge.evaluation.run import Results
from megabridge.evaluation.tasks import Task, specs
from megabridge.parallel.hardware import cores

_OF_RANKS: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that tell libraries that they are one rank of several."""
_TAIL: Final = 2000  # bytes of a failed process's output that its error quotes


class EvaluationError(MegabridgeError):
    """An evaluation that failed. Saved checkpoints are unaffected."""


class Process:
    """Starts an evaluation of `folder` or, with `check`, only looks up the names of lm-evaluation-harness.

    The process ends with this one, however this one ends. `device` is a name of torch, or auto. Raises EvaluationError.
    """

    def __init__(
        self, folder: Path, tasks: Mapping[str, Task], *, batch_size: int = 1, device: str = "cpu", check: bool = False
    ) -> None:
        # The ranks wait, so all cores are free.
        request = {"folder": str(folder), "tasks": specs(tasks), "batch_size": batch_size, "device": device, "check": check}
        environ = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        try:
            self._outcome, self._printed = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # closed with this
            self._child = subprocess.Popen(
                [sys.executable, "-m", "megabridge.evaluation"],
                env=environ | {"OMP_NUM_THREADS": str(cores())},
                stdin=subprocess.PIPE,
                stdout=self._outcome,
                stderr=self._printed,
            )
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(request | {"threads": cores()}).encode() + b"\n")
            self._child.stdin.flush()
        except OSError as error:
            raise EvaluationError(f"an evaluation can't be started: {error.strerror}") from error

    def wait(self, seconds: float) -> bool:
        """Waits for up to `seconds`. Returns whether the process has ended."""
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> None:
        """Kills the process."""
        self._child.kill()
        self._child.wait()

    def results(self) -> Results:
        """Returns the results of an ended evaluation. Raises EvaluationError if it failed."""
        return Results(**self._read())

    def problems(self) -> list[str]:
        """Returns the problems that an ended check found. Raises EvaluationError if it failed."""
        found: list[str] = self._read()["problems"]
        return found

    def _read(self) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._outcome.seek(0)
        text = self._outcome.read()
        self._printed.seek(0)
        printed = self._printed.read()[-_TAIL:].decode(errors="replace").strip()
        code = self._child.returncode
        if code or not text:
            why = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise EvaluationError(f"the evaluating process {why}; it printed:\n{printed or '(nothing)'}")
        try:
            outcome: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise EvaluationError(f"the evaluating process must write JSON, but wrote {text[:100]!r}; run it again.") from error
        if "error" in outcome:
            raise EvaluationError(outcome["error"])
        return outcome
