"""A stop that is asked for by signal: the step ends, one save is written, and the exit code says so."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final, Self

STOPPED_EXIT_CODE: Final = 75
"""Exit code of a run that a signal ended after it was saved (EX_TEMPFAIL: start it again with checkpoint.resume=auto)."""


class Stopped(SystemExit):
    """Raised by `Trainer.fit` after the last save of a run that SIGTERM or SIGUSR1 ended."""

    def __init__(self, step: int) -> None:
        super().__init__(STOPPED_EXIT_CODE)
        self.step = step


class StopSignal:
    """While entered, the first SIGTERM or SIGUSR1 sets `received`; a second one has its ordinary effect at once.

    An ordinary effect in the middle of a save harms nothing: a checkpoint that is not committed is not seen.
    """

    SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and refuses handlers elsewhere.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
