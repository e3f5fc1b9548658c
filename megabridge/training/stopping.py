"""A stop that is asked for by signal: the step ends, one save is written, and the exit code says so."""

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
    """While entered, the first SIGTERM or SIGUSR1 sets `received`; a second one has its ordinary effect at once.

    So does whoever started this process, on the page that they share (megabridge.storage.stop_page): the first signal after that
    is the second.

    An ordinary effect in the middle of a save harms nothing: a checkpoint that is not committed is not seen. In a process that
    was started with these signals blocked they are let through only here, so that none comes too early, and a second one has
    no effect: whoever started it so stays beside it, and ends it when it has to end.
    """

    SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._is_signalled = False
        self._before: dict[signal.Signals, Any] = {}
        self._held: set[int] = set()

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and refuses handlers elsewhere.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
            self._held = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(self.SIGNALS)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)  # one that waited arrives in here
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._held)
        self._restore()

    @property
    def received(self) -> bool:
        """Whether a stop is asked for."""
        return self._is_signalled or stop_page.own().is_asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second = stop_page.own().is_asked
        self._is_signalled = True
        if not self._held:
            self._restore()
            if is_second:
                signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
