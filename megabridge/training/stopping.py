"""Graceful stop on SIGTERM or SIGUSR1: catches the signal; the loop (loop.py) then ends the step, saves and exits with code 75."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final, Self

from megabridge.errors import STOPPED_EXIT_CODE
from megabridge.storage import stop_page


class Stopped(SystemExit):
    """Raised by `Trainer.fit` after the last save of a run that a signal ended."""

    def __init__(self, step: int) -> None:
        super().__init__(STOPPED_EXIT_CODE)
        self.step = step


class StopSignal:
    """Context manager: the first SIGTERM or SIGUSR1 sets `received`, a second one has its default effect at once.

    So does whoever started this process, on the page that they share (megabridge.storage.stop_page): the first signal after that
    is the second.

    Dying in the middle of a save does no harm: a checkpoint that is not committed is ignored. In a process that was started with
    these signals blocked they are unblocked only here, so that none comes too early, and a second one has no effect: the process
    that started it supervises it, and ends it when necessary.
    """

    SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._is_signalled = False
        self._before: dict[signal.Signals, Any] = {}
        self._blocked: set[int] = set()

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and refuses handlers elsewhere.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
            self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(self.SIGNALS)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)  # a pending one arrives here
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        self._restore()

    @property
    def received(self) -> bool:
        """Whether a stop is asked for."""
        return self._is_signalled or stop_page.own().is_asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second = stop_page.own().is_asked
        self._is_signalled = True
        if not self._blocked:
            self._restore()
            if is_second:
                signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
