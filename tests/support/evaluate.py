"""What the ranks of tests/callbacks/test_evaluate.py run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from megabridge.callbacks import Callback
from megabridge.evaluation import __main__ as evaluating
from megabridge.evaluation import process
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import on_rank_zero
from megabridge.parallel.topology import Topology
from megabridge.training.stopping import Stopped
from tests.support import recipes


class Forked:
    """`subprocess.Popen` of the evaluating process, without the start of an interpreter and its imports."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], stdin: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        assert command[1:] == ["-m", "megabridge.evaluation"] and stdin == subprocess.PIPE
        self.returncode: int | None = None
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(write)
                for descriptor, target in ((read, 0), (stdout.fileno(), 1), (stderr.fileno(), 2)):
                    os.dup2(descriptor, target)
                sys.stdin = os.fdopen(0)
                os.environ.clear()
                os.environ.update(env)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                evaluating.main()
                status = 0
            finally:
                os._exit(status)
        os.close(read)
        self.stdin = os.fdopen(write, "wb")

    def wait(self, timeout: float = 240.0) -> int:
        until = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired("evaluation", timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Slow(process.Process):
    """An evaluation that takes three seconds more than it does."""

    def wait(self, seconds: float) -> bool:
        self.until = getattr(self, "until", time.monotonic() + 3)
        time.sleep(min(seconds, max(0.0, self.until - time.monotonic())))
        return time.monotonic() >= self.until and super().wait(seconds)


class Signal(process.Process):
    """An evaluation in which SIGTERM reaches the rank that waits for it."""

    def wait(self, seconds: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return False


class Break(Callback):
    """Takes the tokenizer out of what is evaluated next."""

    def on_save(self, trainer: Any, step: int, folder: Path) -> None:
        if trainer.is_main:
            (folder / "hf" / "config.json").rename(folder / "hf" / "config.gone")


def outlasting_the_timeout(values: dict[str, Any]) -> str:
    """Trains with an evaluation of more than three seconds, where a rank waits two for the others; and one plain wait of three."""
    from megabridge.callbacks import evaluate

    evaluate.Process = Slow  # type: ignore[misc]
    process_groups.start(Topology(dp=2), timeout=values["timeout"])
    recipe("finetune", values)
    try:
        on_rank_zero("waiting at once", lambda: time.sleep(4))
    except Exception as error:
        return f"{type(error).__name__}"
    return "waited"


def stopped(values: dict[str, Any]) -> int | None:
    """The step at which a run ended whose first evaluation a signal interrupts."""
    from megabridge.callbacks import evaluate

    evaluate.Process = Signal  # type: ignore[misc]
    try:
        recipe("finetune", values)
    except Stopped as end:
        return end.step
    return None


def recipe(name: str, values: dict[str, Any], is_forked: bool = True) -> float | None:
    """Runs a recipe; its evaluations run in forks of the rank unless they are to be programs, as they are elsewhere."""
    if is_forked:
        process.subprocess = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[assignment]
    return recipes.recipe(name, values)
