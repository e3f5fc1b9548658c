"""What the ranks of tests/callbacks/test_evaluate.py run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from megabridge.callbacks import Callback
from megabridge.evaluation import process
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import on_rank_zero
from megabridge.parallel.topology import Topology
from megabridge.training.stopping import Stopped
from tests.support import recipes


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
    recipes.recipe("finetune", values)
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
        recipes.recipe("finetune", values)
    except Stopped as end:
        return end.step
    return None


def recipe(name: str, values: dict[str, Any]) -> float | None:
    """Runs a recipe without anything changed."""
    return recipes.recipe(name, values)
