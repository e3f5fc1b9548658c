"""A callback for the first attempt of a queued run."""

from __future__ import annotations

import os
import signal
import time

from megabridge.callbacks import Callback
from megabridge.training.loop import Trainer


class WaitsForSignal(Callback):
    """Before the third step of a first attempt, waits until the queue's signal has come: it arrives at some time in a minute."""

    def before_step(self, trainer: Trainer) -> None:
        if trainer.step == 2 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and "SLURM_JOB_ID" in os.environ:
            stop = signal.getsignal(signal.SIGUSR1).__self__  # type: ignore[union-attr]
            while not stop.received:
                time.sleep(0.1)
